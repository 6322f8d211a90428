"""Buckets in memory that trainer and engine both see: the engine is sent a handle, and copies from there.

On the CPU it is shared memory, and engines must run on rank 0's machine. On GPUs they are CUDA IPC handles. An engine that
shares the trainer's GPUs has each TP rank on the GPU of some rank of the trainer, on any machine: so every bucket is
broadcast to all ranks of the trainer, each makes a handle for its copy, and rank 0 gives every engine those of its GPUs.
An engine's answer means that the memory may be written again: torch has a process wait for its copies before it lets a
handle's memory go.

What SGLang unpickles is {"flattened_tensor": uint8 tensor, "metadata": [name, shape, dtype, start_idx, end_idx, numel]}. It
allows few classes in it; a SimpleNamespace has the fields that it reads.
"""

import base64
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_gppo.metrics import Phases
from megatron_gppo.parallel import ParallelState
from megatron_gppo.weight_sync.addresses import is_on_this_machine
from megatron_gppo.weight_sync.bucket import Bucket, num_bytes
from megatron_gppo.weight_sync.endpoint import EngineProcess, WeightSyncError
from megatron_gppo.weight_sync.fleet import Calls, Fleet
from megatron_gppo.weight_sync.transport import Processes

# Where torch's description of a CUDA tensor has the number of its device. That may be another one in the engine's process:
# SGLang takes the GPU's UUID in its place.
DEVICE_ARGUMENT = 6


class SharedMemoryTransport:
    """See Transport."""

    in_session = True

    def __init__(self, parallel: ParallelState) -> None:
        self._parallel = parallel
        self._processes: Processes = {}
        self._copies: list[Tensor] = []  # buckets take turns in them, on GPU ranks other than 0
        self._turns = itertools.cycle(range(2))
        self._opened_by: dict[tuple[str, int], Any] = {}  # URL and GPU -> what opens the copy of the rank on that GPU
        self._phase = ""
        self._loading: Calls[None] = {}

    def prepare(self, fleet: Fleet, processes: Processes, device: torch.device) -> None:
        self._processes = processes
        for process in processes.values():
            if device.type == "cpu" and not is_on_this_machine(process.url):
                raise WeightSyncError(
                    f"{process.url} is not on rank 0's machine, and sync.transport = tensor needs memory that both see. "
                    f"Fix: set sync.transport: distributed or disk"
                )

    def pass_bucket(self, bucket: Bucket | None, size: int, urls: Sequence[str], device: torch.device) -> None:
        if device.type == "cpu":
            return
        data = bucket.data if bucket is not None else self._next_copy(size, device)
        if self._parallel.world_size > 1:
            dist.broadcast(data, src=0)
        torch.cuda.synchronize(device)  # the engine's process does not wait for what is queued in this one
        mine = (device.index, [url for url in urls if is_on_this_machine(url)], cuda_handle(data))
        self._opened_by = {
            (url, gpu): handle for gpu, local_urls, handle in self._parallel.gather(mine) for url in local_urls
        }

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        self._phase = phase
        handles = {endpoint: self._handles(bucket, self._processes[endpoint]) for endpoint in fleet.endpoints}
        self._loading = fleet.start(lambda endpoint: endpoint.load(handles[endpoint], version=version))

    def wait(self, fleet: Fleet, phases: Phases) -> None:
        calls, self._loading = self._loading, {}
        with phases("load"):
            fleet.finish(f"load {self._phase}", calls)

    def close(self) -> None:
        self._copies = []

    def _handles(self, bucket: Bucket, process: EngineProcess) -> list[str]:
        """One for each TP rank of the engine: torch counts who has opened what."""
        if bucket.data.device.type == "cpu":
            return [serialized(bucket, bucket.data) for _ in range(process.tp_size)]
        if missing := [gpu for gpu in process.gpus if (process.url, gpu) not in self._opened_by]:
            raise WeightSyncError(
                f"no rank of the trainer is on GPU {missing[0]} of the machine of {process.url}, and sync.transport = tensor "
                f"needs memory that both see. Fix: set sync.transport: distributed, or let the engine share the trainer's GPUs"
            )
        return [serialized(bucket, _OpenedBy(self._opened_by[process.url, gpu])) for gpu in process.gpus]

    def _next_copy(self, size: int, device: torch.device) -> Tensor:
        turn = next(self._turns)
        if len(self._copies) <= turn:
            self._copies.append(torch.empty(size, dtype=torch.uint8, device=device))
        if self._copies[turn].numel() < size:
            self._copies[turn] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._copies[turn][:size]


class _OpenedBy:
    """Pickled, it is the call that opens another rank's CUDA tensor."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return reductions.rebuild_cuda_tensor, self._arguments


def serialized(bucket: Bucket, data: Tensor | _OpenedBy) -> str:
    """What update_weights_from_tensor takes for one TP rank. A CPU tensor's storage moves to shared memory, and stays there."""
    ends = list(itertools.accumulate(num_bytes([shape], bucket.dtype) for shape in bucket.shapes))
    metadata = [
        SimpleNamespace(
            name=name, shape=torch.Size(shape), dtype=bucket.dtype, start_idx=start, end_idx=end, numel=end - start
        )
        for name, shape, start, end in zip(bucket.names, bucket.shapes, [0, *ends[:-1]], ends, strict=True)
    ]
    with _shared_by_name() if isinstance(data, Tensor) else nullcontext():
        pickled = ForkingPickler.dumps({"flattened_tensor": data, "metadata": metadata})
    return base64.b64encode(pickled).decode()


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """CPU tensors that are pickled in the context go by name. By default they go as open file descriptors, which the engine
    would have to fetch from this process.
    """
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        _start_manager()
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


@cache
def _start_manager() -> None:
    """torch's daemon for names lives as long as an engine that has opened one, which may outlive this process by far, and
    would keep our stderr open: who reads it through a pipe would wait for the engine's end.
    """
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        torch.empty(1).share_memory_()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def cuda_handle(data: Tensor) -> tuple[Any, ...]:
    """What torch.multiprocessing would send to another process about a CUDA tensor, with its GPU by UUID."""
    _, arguments = reductions.reduce_tensor(data)
    uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_ARGUMENT]).uuid)
    return (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
