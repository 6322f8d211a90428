"""One push: every bucket to every engine of a fleet. Runs on rank 0 only."""

from collections.abc import Iterator

import torch

from megatron_gppo.config import PauseMode
from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.endpoint import WeightEndpoint, WeightSyncError
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.sample import RollingSample
from megatron_gppo.weight_sync.transport import Transport


def push(
    fleet: Fleet,
    transport: Transport,
    buckets: Iterator[Bucket],
    num_buckets: int,
    num_bytes: int,
    *,
    version: str,
    pause: PauseMode,
    device: torch.device,
    sample: RollingSample,
    phases: Phases,
) -> None:
    """Replaces the weights of every engine by `buckets`, which are on `device` and hold `num_bytes`, as version `version`,
    and checks the sample.

    While one bucket is being sent and loaded, the next is taken from the iterator. Engines that fail leave the fleet.

    `phases` gets the seconds of "prepare", "send" and "load" (what taking the next bucket did not hide) and "check". Raises
    WeightSyncError when no engine is left or the sample is wrong, and SendAgainError.
    """
    with phases("prepare"):
        processes = fleet.on_all("read the engine's layout", WeightEndpoint.process)
        fleet.on_all("pause", lambda endpoint: endpoint.pause(pause))
        if transport.in_session:
            fleet.on_all("begin", WeightEndpoint.begin_update)
        # Last: a member that is lost afterwards, before the first bucket, would be missed in a broadcast by all others.
        transport.prepare(fleet, processes, device)
        sample.begin()
    num_sent = 0
    for number in range(1, num_buckets + 1):
        bucket = next(buckets)
        num_sent += bucket.data.nbytes
        transport.wait(fleet, phases)
        with phases("send"):
            phase = f"bucket {number} of {num_buckets}"
            transport.send(fleet, bucket, phase, version if number == num_buckets else None)
        with phases("check"):
            sample.add(bucket)
    transport.wait(fleet, phases)
    with phases("load"):
        if transport.in_session:
            fleet.on_all("end", WeightEndpoint.end_update)
        fleet.on_all("forget the old cache", WeightEndpoint.forget_cache)
    with phases("check"):
        if num_sent != num_bytes:
            raise WeightSyncError(f"weight sync: {num_sent} bytes were sent, not {num_bytes}")
        for endpoint, reported in fleet.on_all("check version", WeightEndpoint.weight_version).items():
            if reported != version:
                wrong = WeightSyncError(f"reports weight version {reported}, not {version}")
                fleet.lose(endpoint, "check version", wrong)
        held = fleet.on_all("check sample", lambda endpoint: endpoint.checksums(skip=sample.skip))
        sample.check({processes[endpoint]: checksums for endpoint, checksums in held.items()})
        fleet.on_all("resume", WeightEndpoint.resume)
