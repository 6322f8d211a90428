"""The group that weights are broadcast in, over gloo, with processes that receive as an engine's ranks do.

The engines' side of it, in SGLang itself: tests/e2e/test_weight_sync.py.
"""

from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync import WeightSyncError
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.distributed import DistributedTransport
from megatron_gppo.weight_sync.endpoint import EngineProcess, NoAnswerError, WeightEndpoint
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.transport import SendAgainError
from tests.support.distributed import PRELOADED

CPU = torch.device("cpu")
NUM_BYTES = 1024  # sent whole or not at all: see "in the middle" in distributed.py
TIMEOUT_S = 60.0


class Member(WeightEndpoint):
    """An engine of one rank, which is a process here and is asked through a pipe."""

    def join_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=receive_all, args=(theirs, address, port, rank_offset, world_size, name))
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "joined"

    def receive(self, bucket: Bucket, *, group: str, version: str | None) -> None:
        try:
            self.pipe.send(bucket.data.nbytes)
            failure = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise NoAnswerError(f"{self.url} failed: {error!r}") from error
        if failure is not None:
            raise WeightSyncError(f"{self.url} answered 400: {failure}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def receive_all(pipe: Connection, address: str, port: int, rank: int, world_size: int, name: str) -> None:
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    keys = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    group = dist.ProcessGroupGloo(keys, rank, world_size, timedelta(seconds=TIMEOUT_S))
    pipe.send("joined")
    while True:
        data = torch.empty(pipe.recv(), dtype=torch.uint8)
        try:
            group.broadcast(data, 0).wait()
            pipe.send(None)
        except RuntimeError as error:
            pipe.send(str(error))


@pytest.mark.parametrize("dying", [0, 1])
def test_a_member_that_dies_is_the_only_one_to_blame(dying: int) -> None:
    members = [Member(f"http://engine-{number}", None, TIMEOUT_S) for number in range(2)]
    processes = {member: EngineProcess(member.url, "", 1, (), "float32", "cpu", False) for member in members}
    fleet = Fleet(members)
    transport = DistributedTransport("127.0.0.1", TIMEOUT_S)
    bucket = Bucket(["a"], [(NUM_BYTES,)], torch.uint8, torch.ones(NUM_BYTES, dtype=torch.uint8))
    try:
        transport.prepare(fleet, processes, CPU)
        transport.send(fleet, bucket, "bucket 1 of 2", None)
        transport.wait(fleet, Phases())
        assert fleet.failed == {}
        members[dying].end()
        transport.send(fleet, bucket, "bucket 2 of 2", None)
        with pytest.raises(SendAgainError):
            transport.wait(fleet, Phases())
        assert list(fleet.failed) == [members[dying].url]
        assert "phase 'broadcast bucket 2 of 2'" in fleet.failed[members[dying].url]
    finally:
        for member in members:
            member.end()
