"""One push: every bucket to every engine of a fleet. Runs on rank 0 only."""

from collections.abc import Iterable

import torch

from megatron_gppo.config import PauseMode
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.sample import RollingSample
from megatron_gppo.weight_sync.transport import Transport


def push(
    fleet: Fleet,
    transport: Transport,
    buckets: Iterable[Bucket],
    num_buckets: int,
    *,
    version: str,
    pause: PauseMode,
    device: torch.device,
    sample: RollingSample,
) -> None:
    """Replaces the weights of every engine by `buckets`, which are on `device`, as version `version`, and checks the sample.

    While one bucket is being sent and loaded, the next is taken from the iterator. Engines that fail leave the fleet.

    Raises WeightSyncError when none is left or the sample is wrong, and SendAgainError.
    """
    processes = fleet.on_all("read the engine's layout", WeightEndpoint.process)
    transport.prepare(fleet, processes, device)
    fleet.on_all("pause", lambda endpoint: endpoint.pause(pause))
    if transport.in_session:
        fleet.on_all("begin", WeightEndpoint.begin_update)
    sample.begin()
    for number, bucket in enumerate(buckets, start=1):
        transport.wait(fleet)
        transport.send(fleet, bucket, f"bucket {number} of {num_buckets}", version if number == num_buckets else None)
        sample.add(bucket)
    transport.wait(fleet)
    if transport.in_session:
        fleet.on_all("end", WeightEndpoint.end_update)
    fleet.on_all("forget the old cache", lambda endpoint: endpoint.forget_cache(pause))
    for endpoint, reported in fleet.on_all("check version", WeightEndpoint.weight_version).items():
        if reported != version:
            fleet.lose(endpoint, "check version", f"reports weight version {reported}, not {version}")
    checksums = fleet.on_all("check sample", lambda endpoint: endpoint.checksums(skip=sample.skip))
    sample.check({processes[endpoint]: held for endpoint, held in checksums.items()})
    fleet.on_all("resume", WeightEndpoint.resume)
