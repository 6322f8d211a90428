"""Buckets broadcast from rank 0 through a torch.distributed group of its own with all engines.

The group: rank 0 is this process, then come each engine's TP ranks. It is no part of the trainer's default group, and
belongs to certain engine processes: when one of them ends, or a new one is there, the group is made anew.

Nothing here waits without limit. An engine that fails ends the wait for it at once: what may block in the group runs in a
daemon thread, and the main thread watches it and the engines' answers. As nobody can leave a group that is waiting for a
broadcast, one lost engine ends it for all; the others answer with an error then, which is not their fault.

Unless it is lost in the middle of a bucket: gloo forgets a message of which a part has come (Pair::signalException tells
only those that have none yet), and NCCL waits for the rest, too. An engine that then does not answer is lost with it, and
started again; and this side's end of gloo's group waits for its own time limit.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.endpoint import EngineProcess, NoAnswerError, WeightEndpoint, WeightSyncError
from megatron_gppo.weight_sync.fleet import Calls, Fleet, in_thread
from megatron_gppo.weight_sync.transport import Processes, SendAgainError

T = TypeVar("T")
POLL_S = 0.0002
# When the group breaks, a dead engine's HTTP call fails a moment later, and says more; a live one's ends, too.
GRACE_S = 10.0
START_S = 1.0  # for a broadcast to have been started; NCCL's first may wait for engines that have gone


class DistributedTransport:
    """See Transport. `host` is an address of this machine that the engines can reach."""

    in_session = True

    def __init__(self, host: str, timeout_s: float) -> None:
        self._host = host
        self._timeout_s = timeout_s
        self._members: Sequence[tuple[WeightEndpoint, EngineProcess]] = ()
        self._store: dist.TCPStore | None = None
        self._group: Any = None  # ProcessGroupGloo or ProcessGroupNCCL; torch's stubs give them no common broadcast
        self._group_name = ""
        self._phase = ""
        self._receiving: Calls[None] = {}
        self._sending: Future[Any] | None = None

    def prepare(self, fleet: Fleet, processes: Processes, device: torch.device) -> None:
        """The group is NCCL's if `device` is a GPU, gloo's otherwise."""
        members = [(endpoint, processes[endpoint]) for endpoint in fleet.endpoints]
        if self._group is not None and [process for _, process in self._members] == [process for _, process in members]:
            return
        self.close()
        self._join(fleet, members, "nccl" if device.type == "cuda" else "gloo")
        self._members = members

    def pass_bucket(self, bucket: Bucket | None, size: int, urls: Sequence[str], device: torch.device) -> None:
        """Does nothing: rank 0 sends by itself."""

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        self._phase = phase
        self._receiving = fleet.start(
            lambda endpoint: endpoint.receive(bucket, group=self._group_name, version=version)
        )
        if bucket.data.device.type == "cuda":
            # The thread has a stream of its own: what this one's still has to write must be there first.
            torch.cuda.synchronize(bucket.data.device)
        # In a thread, because NCCL's first operation waits for the engines to connect.
        self._sending = in_thread(_start_broadcast, self._group, bucket.data)

    def wait(self, fleet: Fleet, phases: Phases) -> None:
        if self._sending is None:
            return
        with phases("send"):
            self._watch(fleet, f"broadcast {self._phase}", self._receiving, self._is_sent, self._sent)
        self._sending = None
        with phases("load"):
            self._finish(fleet, f"load {self._phase}", self._receiving)

    def _is_sent(self) -> bool:
        assert self._sending is not None
        if not self._sending.done():
            return False
        return self._sending.exception() is not None or self._sending.result().is_completed()

    def _sent(self) -> None:
        assert self._sending is not None
        self._sending.result().wait()

    def close(self) -> None:
        if self._group is None:
            return
        # An engine that has ended meanwhile has left the group, too.
        wait([in_thread(endpoint.leave_group, self._group_name) for endpoint, _ in self._members], timeout=GRACE_S)
        self._end_group()

    def _join(self, fleet: Fleet, members: Sequence[tuple[WeightEndpoint, EngineProcess]], backend: str) -> None:
        try:
            self._store = _make_store(self._host, 0, self._timeout_s, is_master=True)
            own_client = _make_store(self._host, self._store.port, self._timeout_s, is_master=False)
        except (RuntimeError, ValueError) as error:
            raise WeightSyncError(
                f"weight sync, phase 'join group': cannot listen on sync.host = {self._host}: {error}. "
                f"Fix: set sync.host to an address of rank 0's machine"
            ) from error
        self._group_name = f"megatron_gppo_{uuid.uuid4().hex}"
        world_size = 1 + sum(process.tp_size for _, process in members)
        calls: dict[WeightEndpoint, Future[None]] = {}
        rank_offset = 1
        for endpoint, process in members:
            calls[endpoint] = in_thread(
                endpoint.join_group,
                address=self._host,
                port=self._store.port,
                rank_offset=rank_offset,
                world_size=world_size,
                name=self._group_name,
                backend=backend,
            )
            rank_offset += process.tp_size
        own = in_thread(_create_group, own_client, self._group_name, world_size, backend, self._timeout_s)
        self._group = self._watch(fleet, "join group", calls, own.done, own.result)
        self._finish(fleet, "join group", calls)

    def _watch(
        self, fleet: Fleet, phase: str, calls: Calls[None], done: Callable[[], bool], result: Callable[[], T]
    ) -> T:
        """The result of this side's operation once it is done. A call that fails before ends the wait: the operation
        would then never be done.
        """
        deadline = time.monotonic() + self._timeout_s
        while not done():
            if any(_has_failed(call) for call in calls.values()):
                self._break_up(fleet, phase, calls)
            if time.monotonic() > deadline:
                self._break_up(fleet, phase, calls, f"not done after {self._timeout_s:g} s")
            time.sleep(POLL_S)
        try:
            return result()
        except Exception as error:
            cause = str(error)
        # Not in the except clause, where the error's traceback would keep the operation: see _end_group.
        wait(calls.values(), timeout=GRACE_S, return_when=FIRST_EXCEPTION)
        self._break_up(fleet, phase, calls, cause)

    def _finish(self, fleet: Fleet, phase: str, calls: Calls[None]) -> None:
        """Waits for all calls, which end by their own limits, or the first failure."""
        wait(calls.values(), return_when=FIRST_EXCEPTION)
        if any(_has_failed(call) for call in calls.values()):
            self._break_up(fleet, phase, calls, all_sent=True)

    def _break_up(
        self, fleet: Fleet, phase: str, calls: Calls[None], cause: str = "", *, all_sent: bool = False
    ) -> NoReturn:
        """Ends the group, and finds out who is to blame: the engines that do not even answer that it has ended. Failing that,
        those that had answered with an error before. Failing that, all.

        In this order, because a dying engine breaks the others' connections before its own to us: they answer first. When
        `all_sent`, who has not answered yet may be at work on what it has: that is no fault.
        """
        failed_before = [endpoint for endpoint, call in calls.items() if _has_failed(call)]
        self._end_group()
        wait(calls.values(), timeout=GRACE_S)
        gone = [endpoint for endpoint, call in calls.items() if call.done() and _has_no_answer(call)]
        if not all_sent:
            gone += [endpoint for endpoint, call in calls.items() if not call.done()]
        for endpoint in gone or failed_before or calls:
            call = calls[endpoint]
            if not call.done():
                error: BaseException = NoAnswerError(cause or f"still waiting {GRACE_S:g} s after its group had ended")
            else:
                error = call.exception() or WeightSyncError(cause)
            fleet.lose(endpoint, phase, error)
        fleet.require_one()
        raise SendAgainError

    def _end_group(self) -> None:
        """On this side: an engine may still be waiting for a broadcast, and gets an error now.

        gloo's connections stay open as long as an operation is referenced, whatever abort() does, so nobody but
        self._sending may hold one here. The store's end is that of every wait for the group to be formed: the engines' and
        our thread's.
        """
        if self._sending is not None:
            wait([self._sending], timeout=START_S)  # one that started after abort() would keep them, too
        if self._group is not None:
            self._group.abort()
        self._group = self._store = self._sending = None
        self._members = ()


def _has_failed(call: Future[Any]) -> bool:
    return call.done() and call.exception() is not None


def _has_no_answer(call: Future[Any]) -> bool:
    return isinstance(call.exception(), NoAnswerError)


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
