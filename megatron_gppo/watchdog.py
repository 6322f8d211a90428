"""Ends a run that stands still, or that a rank has left, and says where every rank was.

The main thread of each rank names its phase (enter) and says when it gets on (progress). Threads beside it notice

- a phase that does not get on within its limit: every rank prints phase and stacks, also to run.dir/stalls, and ends;
- a rank that is not heard of, or a rendezvous store that does not answer, for run.stall_timeout_s: likewise;
- a rank that failed: the others end, if they have not within LEAVE_S found out by themselves and ended in good order.

A blocked collective never returns to Python, so the process is ended from the thread (os._exit); engines end with it
(rollout/guard.py). What the main thread can still report, it does: naming_failures() says which rank is gone.
"""

import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from megatron_gppo.config import Config
from megatron_gppo.job import Job
from megatron_gppo.parallel import PeerFailed, is_of_communication
from megatron_gppo.peers import Ending, Peers

INTERVAL_S = 0.25
REPORT_S = 10.0  # for all ranks to report before the run ends
LEAVE_S = 30.0  # for a rank to end in good order after another one failed
STALLS = "stalls"  # in run.dir


class PeerGone(RuntimeError):  # noqa: N818 - like PeerFailed
    """A collective failed because another rank is gone. Reported already."""


def limits(config: Config) -> dict[str, float]:
    """Seconds that a phase may last without getting on; run.stall_timeout_s for the others.

    What has a limit of its own inside (a request, a part of a sync, a collective) gets that first: its error says more.
    """
    stall = config.run.stall_timeout_s
    collective = stall + config.run.collective_timeout_s
    rollout = config.rollout
    requests = stall + rollout.request_timeout_s * (1 + rollout.max_retries) + rollout.start_timeout_s
    return {
        "join": collective,
        "build": collective,
        "load": collective,
        "start": stall + config.rollout.start_timeout_s,
        "rollout": requests,
        "evaluation": requests,
        "sync": stall + config.sync.timeout_s + rollout.start_timeout_s,  # it may wait for an engine to come up
        "checkpoint": collective,
    }


@contextmanager
def ended_if_late(what: str, limit_s: float) -> Iterator[None]:
    """Ends the process, with its stacks, when the block takes longer: for what a rank does before it has a Watchdog."""

    def end() -> None:
        print(f"stall: {what}: not done after {limit_s:g} s\n{_stacks()}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """Of one rank. A context manager; enter it before the process groups are made."""

    def __init__(self, config: Config, job: Job) -> None:
        self._rank = job.rank
        self._world_size = job.world_size
        self._store_address = job.store_address
        self._folder = config.run.dir / STALLS
        self._stall_s = config.run.stall_timeout_s
        self._limits = limits(config)
        self._peers = Peers(job)
        self._phase, self._detail = "join", ""
        self._since = self._moved = time.monotonic()
        self._rank_0_moves = 0
        self._ending_seen: float | None = None
        self._naming_until = 0.0  # the main thread is finding out who is gone: no stall
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._peers.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self._peers.close()

    def enter(self, phase: str, detail: str = "") -> None:
        """What the main thread does from now on."""
        self._phase, self._detail = phase, detail
        self._since = self._moved = time.monotonic()
        self._peers.moved()

    def progress(self, phase: str) -> None:
        """It has got on, if this is its phase: what goes on beside it proves nothing about it."""
        if phase == self._phase:
            self._moved = time.monotonic()
            self._peers.moved()

    def reporting(self, phase: str) -> Callable[[int, int], None]:
        """progress() for who reports (done, wanted)."""
        return lambda done, wanted: self.progress(phase)

    def ask_to_stop(self) -> None:
        """This rank was told to stop, and may be waiting for rank 0's rollout, which is to be cut short."""
        self._peers.ask_to_stop()

    def when_asked_to_stop(self, action: Callable[[], None]) -> None:
        """What rank 0 does, in a thread, once another rank has asked."""
        if self._rank == 0:
            self._peers.on_stop = action

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Tells the other ranks when the block fails. Raises PeerGone where a collective failed, and reports who is gone."""
        try:
            yield
        except (PeerFailed, PeerGone):
            raise
        except Exception as error:
            cause = _first_sentence(error)
            self._peers.say(Ending("failure", self._rank, f"{self._where()}: {type(error).__name__}: {cause}"))
            if not is_of_communication(error):
                self._await(lambda: self._peers.ending is not None, 2.0)
                raise
            print(f"error: {self._where()}: {self._who_is_gone()} ({cause})", file=sys.stderr, flush=True)
            raise PeerGone(cause) from error

    def _who_is_gone(self) -> str:
        self._ending_seen = self._naming_until = time.monotonic() + 2 * REPORT_S  # to be left alone meanwhile
        self._await(lambda: self._peers.num_reports == self._world_size, REPORT_S)
        ending = self._peers.ending
        if ending is None:
            return f"the other ranks are gone, and so is the rendezvous store at {self._store_address} ({self._peers.broken or 'no answer'})"
        if ending.rank != self._rank and self._peers.num_reports == self._world_size:
            return f"another rank failed first: {ending.text}"
        return f"gone: {self._missing() or 'none, but the connection broke'}"

    def _missing(self) -> str:
        self._peers.find_missing()
        self._await(lambda: self._peers.missing is not None, REPORT_S)
        return ", ".join(self._peers.missing or [])

    def _watch(self) -> None:
        while not self._closed.is_set():
            # Should a thread keep Python's lock for good, this one stands still, too; this timer needs no lock.
            faulthandler.dump_traceback_later(self._stall_s + 4 * REPORT_S, exit=True)
            self._closed.wait(INTERVAL_S)
            if self._peers.rank_0_moves != self._rank_0_moves:  # what it does, the others wait for
                self._rank_0_moves = self._peers.rank_0_moves
                self._moved = time.monotonic()
            if (stall := self._stall()) is not None:
                self._end_stalled(stall)
            self._end_if_left_behind()
        faulthandler.cancel_dump_traceback_later()

    def _stall(self) -> str | None:
        ending = self._peers.ending
        if ending is not None and ending.kind == "stall":
            return ending.text
        now = time.monotonic()
        if now < self._naming_until:
            return None
        limit = self._limits.get(self._phase, self._stall_s)
        if now - self._moved > limit:
            return f"{self._where()}: no progress for {limit:g} s"
        if self._peers.broken is None and now - self._peers.last_contact > self._stall_s:
            return f"{self._where()}: the rendezvous store at {self._store_address} has not answered for {self._stall_s:g} s: cut off"
        if silent := self._peers.silent(self._stall_s):
            return f"{self._where()}: {', '.join(silent)} not heard of for {self._stall_s:g} s: cut off, or gone"
        return None

    def _end_stalled(self, stall: str) -> NoReturn:
        report = f"stall: {stall}\n{self._state()}"
        # A file first: torchrun may end the others as soon as one has ended.
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"rank_{self._rank}.txt").write_text(report)
        except OSError as error:
            report += f"(not kept in {self._folder}: {error.strerror})\n"
        print(report, file=sys.stderr, flush=True)
        self._peers.say(Ending("stall", self._rank, stall))
        silent = len(self._peers.silent(self._stall_s))
        if time.monotonic() - self._peers.last_contact < self._stall_s:
            self._await(lambda: self._peers.num_reports >= self._world_size - silent, REPORT_S)
        if self._peers.ending is None:
            others = "the other ranks could not be told"
        elif self._peers.num_reports == self._world_size:
            others = f"all {self._world_size} ranks have reported"
        else:
            others = f"no report from {self._missing()}"
        self._end(f"{stall}; {others}; see {self._folder}")

    def _end_if_left_behind(self) -> None:
        """Ends the process when another rank failed, or the job has ended, and the main thread has not noticed in time."""
        if self._peers.ending is None and self._peers.broken is None:
            return
        now = time.monotonic()
        self._ending_seen = self._ending_seen or now
        if now - self._ending_seen > LEAVE_S:
            ending = self._peers.ending
            cause = (
                ending.text
                if ending is not None
                else f"the rendezvous store at {self._store_address} is gone: {self._peers.broken}"
            )
            self._end(f"{self._where()}: the run has ended: {cause}")

    def _end(self, why: str) -> NoReturn:
        print(f"error: {why}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        for child in multiprocessing.active_children():  # checkpointing's; they would wait for this process for ever
            child.kill()
        os._exit(1)

    def _await(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and self._peers.broken is None and time.monotonic() < deadline:
            time.sleep(INTERVAL_S / 5)

    def _where(self) -> str:
        return f"rank {self._rank}, phase '{self._phase}'" + (f" ({self._detail})" if self._detail else "")

    def _state(self) -> str:
        """Phase and stacks of this rank."""
        return f"{self._where()}, for {time.monotonic() - self._since:.0f} s on {os.uname().nodename}\n{_stacks()}"


def _stacks() -> str:
    """Of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"  thread {names.get(ident, ident)}:\n")
        lines += traceback.format_stack(frame)
    return "".join(lines)


def _first_sentence(error: Exception) -> str:
    """Without the source file that gloo names first, and the advice that follows."""
    line = str(error).splitlines()[0] if str(error) else ""
    return re.sub(r"^\[\S*:\d+\] ", "", line).split(". ")[0]
