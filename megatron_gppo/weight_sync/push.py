"""Buckets from global rank 0 to every engine, through a torch.distributed group of their own. Runs on rank 0 only.

The group: rank 0 is this process, then come each engine's TP ranks. It is no part of the trainer's default group.

Nothing here waits without limit, and an engine that fails ends the wait for it at once: HTTP calls, and what may block in
the group, run in daemon threads, and the main thread watches both.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.weight_sync.endpoint import WeightEndpoint, WeightSyncError
from megatron_gppo.weight_sync.export import Bucket

T = TypeVar("T")
POLL_S = 0.0005
# When the group breaks, the dead engine's HTTP call fails a moment later, and says more.
GRACE_S = 5.0


class WeightPusher:
    """Sends weights to all engines. Every error is a WeightSyncError that names the phase and the engine's URL; after
    one, the engines' weights and the group are in an unknown state, and only close() may be called.
    """

    def __init__(self, endpoints: Sequence[WeightEndpoint], host: str, timeout_s: float) -> None:
        self._endpoints = endpoints
        self._host = host
        self._timeout_s = timeout_s
        self._failed = False
        self._store: dist.TCPStore | None = None
        self._group: Any = None  # ProcessGroupGloo or ProcessGroupNCCL; torch's stubs give them no common broadcast
        self._group_name = f"megatron_gppo_{uuid.uuid4().hex}"

    def join(self, device: torch.device) -> None:
        """Creates the group with all engines: NCCL if `device`, where the buckets will be, is a GPU, gloo otherwise."""
        tp_sizes = self.on_all("read the engine's layout", WeightEndpoint.tp_size)
        phase = "join group"
        try:
            self._store = _make_store(self._host, 0, self._timeout_s, is_master=True)
            own_client = _make_store(self._host, self._store.port, self._timeout_s, is_master=False)
        except (RuntimeError, ValueError) as error:
            raise self._failure(
                phase,
                f"cannot listen on sync.host = {self._host}: {error}. Fix: set sync.host to an address of rank 0's machine",
            ) from error
        backend = "nccl" if device.type == "cuda" else "gloo"
        calls: dict[WeightEndpoint, Future[None]] = {}
        world_size = 1
        for endpoint, tp_size in zip(self._endpoints, tp_sizes, strict=True):
            calls[endpoint] = _in_thread(
                endpoint.join_group,
                address=self._host,
                port=self._store.port,
                rank_offset=world_size,
                world_size=1 + sum(tp_sizes),
                name=self._group_name,
                backend=backend,
            )
            world_size += tp_size
        own = _in_thread(_create_group, own_client, self._group_name, world_size, backend, self._timeout_s)
        try:
            self._group = self._watch(phase, calls, own.done, own.result)
            self._finish(phase, calls)
        except WeightSyncError:
            # Ends the store, and with it every wait for the group: the engines' and our thread's.
            self._store = None
            raise

    def push(self, buckets: Iterable[Bucket], num_buckets: int, version: int) -> None:
        """Replaces the weights of every engine by `buckets`, as policy version `version`.

        While an engine loads one bucket, the next is taken from the iterator.
        """
        assert self._group is not None, "join first"
        self.on_all("pause", WeightEndpoint.pause)
        self.on_all("begin", WeightEndpoint.begin_update)
        loading: dict[WeightEndpoint, Future[None]] = {}
        for number, bucket in enumerate(buckets, start=1):
            self._finish(f"load bucket {number - 1} of {num_buckets}", loading)
            loading = {
                endpoint: _in_thread(
                    endpoint.receive,
                    bucket,
                    group=self._group_name,
                    version=str(version) if number == num_buckets else None,
                )
                for endpoint in self._endpoints
            }
            self._broadcast(f"broadcast bucket {number} of {num_buckets}", bucket.data, loading)
        self._finish(f"load bucket {num_buckets} of {num_buckets}", loading)
        self.on_all("end", WeightEndpoint.end_update)
        self._check_version(str(version))
        self.on_all("resume", WeightEndpoint.resume)

    def on_all(self, phase: str, call: Callable[[WeightEndpoint], T]) -> list[T]:
        """`call` for every engine, side by side; the results in the order of the engines."""
        return self._finish(phase, {endpoint: _in_thread(call, endpoint) for endpoint in self._endpoints})

    def close(self) -> None:
        """Leaves the group. After a failure only this side does: an engine may still be waiting for a broadcast."""
        if self._group is None:
            return
        if not self._failed:
            # An engine that has ended meanwhile has left the group too, and was reported by whoever needed it.
            with suppress(WeightSyncError):
                self.on_all("leave group", lambda endpoint: endpoint.leave_group(self._group_name))
        self._group.abort()
        self._group = self._store = None

    def _check_version(self, version: str) -> None:
        for endpoint, reported in zip(
            self._endpoints, self.on_all("check version", WeightEndpoint.weight_version), strict=True
        ):
            if reported != version:
                raise self._failure("check version", f"{endpoint.url} reports weight version {reported}, not {version}")

    def _broadcast(self, phase: str, data: Tensor, loading: Mapping[WeightEndpoint, Future[None]]) -> None:
        if data.device.type == "cuda":
            # The thread has a stream of its own: what this one's still has to write must be there first.
            torch.cuda.synchronize(data.device)
        # In a thread, because NCCL's first operation waits for the engines to connect.
        own = _in_thread(_start_broadcast, self._group, data)
        self._watch(
            phase,
            loading,
            done=lambda: own.done() and (own.exception() is not None or own.result().is_completed()),
            result=lambda: own.result().wait(),
        )

    def _watch(
        self,
        phase: str,
        calls: Mapping[WeightEndpoint, Future[None]],
        done: Callable[[], bool],
        result: Callable[[], T],
    ) -> T:
        """The result of this side's operation once it is done. A call that fails before ends the wait: the operation
        would then never be done.
        """
        deadline = time.monotonic() + self._timeout_s
        while not done():
            self._raise_failure(phase, calls)
            if time.monotonic() > deadline:
                raise self._failure_with(calls, phase, f"not done after {self._timeout_s:g} s")
            time.sleep(POLL_S)
        try:
            return result()
        except Exception as error:
            wait(calls.values(), timeout=GRACE_S, return_when=FIRST_EXCEPTION)
            self._raise_failure(phase, calls)
            raise self._failure_with(calls, phase, str(error)) from error

    def _finish(self, phase: str, calls: Mapping[WeightEndpoint, Future[T]]) -> list[T]:
        """Waits for all calls, which end by their own limits, or the first failure."""
        wait(calls.values(), return_when=FIRST_EXCEPTION)
        self._raise_failure(phase, calls)
        return [call.result() for call in calls.values()]

    def _raise_failure(self, phase: str, calls: Mapping[WeightEndpoint, Future[Any]]) -> None:
        for endpoint, call in calls.items():
            if call.done() and (error := call.exception()) is not None:
                cause = str(error) if isinstance(error, WeightSyncError) else f"{endpoint.url}: {error!r}"
                raise self._failure(phase, cause) from error

    def _failure_with(self, calls: Mapping[WeightEndpoint, Future[Any]], phase: str, cause: str) -> WeightSyncError:
        """Names the engines whose calls are still open: one of them is the cause."""
        waiting = [endpoint.url for endpoint, call in calls.items() if not call.done()] or [e.url for e in calls]
        return self._failure(phase, f"with {', '.join(waiting)}: {cause}")

    def _failure(self, phase: str, cause: str) -> WeightSyncError:
        self._failed = True
        return WeightSyncError(f"weight sync, phase '{phase}': {cause}")


def _make_store(host: str, port: int, timeout_s: float, *, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def _create_group(store: dist.Store, name: str, world_size: int, backend: str, timeout_s: float) -> Any:
    """Rank 0's end of a group that the engines make with init_process_group's machinery, under the same keys.

    The backend is made directly: torch's own helper would register the group in, and for NCCL split it from, the
    trainer's default group, which the engines are not in.
    """
    # Later than our own limit, so that the error is ours; NCCL's watchdog would end the process.
    timeout = timedelta(seconds=timeout_s + 10)
    device_type = "cuda" if backend == "nccl" else "cpu"
    keys = dist.PrefixStore(f"{device_type}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    if backend == "gloo":
        return dist.ProcessGroupGloo(keys, 0, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(keys, 0, world_size, options)


def _start_broadcast(group: Any, data: Tensor) -> Any:
    """The Work of sending `data` to the engines."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    if data.device.type == "cuda":
        torch.cuda.set_device(data.device)
    return group.broadcast([data], options)


def _in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
    """Runs it in a daemon thread, which, unlike an executor's, does not keep a failing process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
