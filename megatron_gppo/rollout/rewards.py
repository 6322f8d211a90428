"""Rewards of responses, judged in worker processes that can be killed.

One thread a worker process takes questions from a queue, sends a few at a time and waits for each answer with a time
limit. A worker that hangs is killed, one that died is noticed; either way its question is counted as such, its other
questions go back to the queue, and a new process takes its place. Nothing turns into a silent 0: see Verdict.outcome.
"""

import asyncio
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from megatron_gppo.config import RewardConfig
from megatron_gppo.datatypes import Outcome, Prompt, Response, Verdict
from megatron_gppo.rollout.reward_worker import Judgement, Question

START_TIMEOUT_S = 300.0  # for a worker to import the reward function; a cold network file system is slow
MAX_QUESTIONS_PER_SEND = 8  # amortises the switch between threads, and is short enough to keep all workers busy

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """The reward function cannot be used, or its workers cannot be started. The message names the fix."""


class RewardPool:
    """Worker processes for one reward function. Usable from any thread and from one event loop after another."""

    def __init__(self, config: RewardConfig) -> None:
        """Starts the workers and waits until each has loaded the reward function.

        Raises RewardError if one cannot, OSError if one cannot even be started.
        """
        self._config = config
        self._questions: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._closed, self._close = Pipe(duplex=False)  # closing _close makes _closed readable, to every thread
        self._reported: set[Outcome] = set()
        started: list[Future[None]] = [Future() for _ in range(config.workers)]
        self._threads = [
            threading.Thread(target=self._run, args=(ready,), name=f"reward-{index}", daemon=True)
            for index, ready in enumerate(started)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for ready in started:
                ready.result()
        except BaseException:  # Ctrl-C during the start, too
            self.close()
            raise

    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
        """The verdicts on one prompt's responses, in their order.

        Raises RewardError or OSError when a worker died and no new one could be started, and when the pool is closed.
        """
        if self._close.closed:
            raise RuntimeError("the reward pool is closed")
        pending = [
            _Pending(prompt, Question(response.text, prompt.ground_truth, prompt.data_source)) for response in responses
        ]
        for one in pending:
            self._questions.put(one)
        return list(await asyncio.gather(*(asyncio.wrap_future(one.verdict) for one in pending)))

    def close(self) -> None:
        """Kills the workers and waits until they are gone. What is being judged raises RewardError."""
        self._close.close()
        for _ in self._threads:
            self._questions.put(None)
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (pending := self._questions.get_nowait()) is not None:
                    pending.fail(RewardError("the reward pool was closed while it judged"))
        self._closed.close()

    def _run(self, started: "Future[None]") -> None:
        """One worker's thread. It owns the process from start to end: Linux ends a worker with the thread it is from."""
        worker: _Worker | None = None
        error: Exception | None = None
        try:
            while True:
                if worker is None:
                    try:
                        worker = _Worker(self._config.function, self._closed)
                    except (RewardError, OSError) as failure:  # OSError: no more processes, memory or files
                        error = failure
                if not started.done():
                    if worker is None:
                        started.set_exception(error)
                    else:
                        started.set_result(None)
                if not (batch := self._next_batch()):
                    return
                if worker is None:
                    for pending in batch:
                        pending.fail(error)
                elif not self._serve(worker, batch):
                    worker.kill()
                    worker = None
        except _ClosedError:
            if not started.done():
                started.set_exception(RewardError("the reward pool was closed while it started"))
        finally:
            if worker is not None:
                worker.kill()

    def _next_batch(self) -> "list[_Pending]":
        """Waits for questions, and leaves their share to the other workers. Empty when the pool closes."""
        first = self._questions.get()
        if first is None:
            return []
        batch = [first]
        share = min(MAX_QUESTIONS_PER_SEND, self._questions.qsize() // len(self._threads))
        while len(batch) < share:
            try:
                another = self._questions.get_nowait()
            except queue.Empty:
                break
            if another is None:
                self._questions.put(None)
                break
            batch.append(another)
        return batch

    def _serve(self, worker: "_Worker", batch: "list[_Pending]") -> bool:
        """Has the batch judged, and says whether the worker can go on."""
        batch = [pending for pending in batch if not pending.verdict.cancelled()]
        try:
            worker.send([pending.question for pending in batch])
            while batch:
                judgement = worker.receive(self._config.timeout_s)
                pending = batch.pop(0)
                if isinstance(judgement, Judgement):
                    pending.settle(self._verdict(judgement))
                    self._report(judgement.outcome, pending, judgement.detail)
                else:
                    pending.settle(Verdict(self._config.incorrect, False, judgement))
                    how = f"no verdict within {self._config.timeout_s:g} s" if judgement == "timeout" else "it died"
                    self._report(judgement, pending, f"{how}; the worker is replaced")
                    return False
            return True
        finally:
            for pending in batch:
                self._questions.put(pending)

    def _verdict(self, judgement: Judgement) -> Verdict:
        score = judgement.score
        if isinstance(score, bool) or score is None:
            return Verdict(self._config.correct if score else self._config.incorrect, bool(score), judgement.outcome)
        return Verdict(score, score > self._config.correct_above, judgement.outcome)

    def _report(self, outcome: Outcome, pending: "_Pending", detail: str | None) -> None:
        """Logs the first of its kind; all are counted by whoever reads the verdicts."""
        if detail is not None and outcome not in self._reported:
            self._reported.add(outcome)
            logger.warning(
                "reward.function = %s: first outcome %r, prompt row %d, response ending in %r: %s",
                *(self._config.function, outcome, pending.prompt.row, pending.question.response[-100:], detail),
            )


@dataclass(frozen=True, slots=True)
class _Pending:
    prompt: Prompt
    question: Question
    verdict: "Future[Verdict]" = field(default_factory=Future)

    def settle(self, verdict: Verdict) -> None:
        if self.verdict.set_running_or_notify_cancel():  # false when whoever waited was cancelled
            self.verdict.set_result(verdict)

    def fail(self, error: Exception | None) -> None:
        if self.verdict.set_running_or_notify_cancel():
            self.verdict.set_exception(error)


class _ClosedError(Exception):
    """The pool was closed while a thread waited for its worker."""


class _Worker:
    """A worker process as its thread sees it."""

    def __init__(self, function: str, closed: Connection) -> None:
        """Starts the process and waits until it is ready. Raises RewardError if it cannot be."""
        self._closed = closed
        self._connection, theirs = Pipe()
        # A program of its own rather than multiprocessing's spawn, which would import the trainer's main module, and
        # with it torch and Megatron. -P and PYTHONPATH: what the trainer can import, and nothing else.
        handle = theirs.fileno()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                f"from megatron_gppo.rollout.reward_worker import serve; serve({handle}, {function!r})",
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[handle],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C does not reach it, and kill() reaches what a reward function starts
        )
        theirs.close()
        try:
            self._wait_until_ready(function)
        except BaseException:
            self.kill()
            raise

    def send(self, questions: list[Question]) -> None:
        # A worker that died while it was idle: receive() says so.
        with contextlib.suppress(OSError):
            self._connection.send(questions)

    def receive(self, timeout_s: float) -> "Judgement | Outcome":
        """The next judgement; "timeout" or "crash" when there is none, after which only kill() makes sense.

        Raises _ClosedError when the pool is closed meanwhile.
        """
        if not self._wait(timeout_s):
            return "timeout"
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return "crash"

    def kill(self) -> None:
        """Ends the process, and what it started, at once."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_until_ready(self, function: str) -> None:
        if not self._wait(START_TIMEOUT_S):
            raise RewardError(
                f"reward.function = {function}: a worker was not ready after {START_TIMEOUT_S:g} s. Fix: make its import quicker"
            )
        try:
            problem = self._connection.recv()
        except (EOFError, OSError):
            raise RewardError(
                f"reward.function = {function}: a worker ended while it started, with exit status {self._process.wait()}. "
                "Fix: see its output above"
            ) from None
        if problem is not None:
            raise RewardError(f"reward.function = {function}: {problem}")

    def _wait(self, timeout_s: float) -> bool:
        """Whether there is something to receive before the time is over."""
        ready = wait([self._connection, self._closed], timeout_s)
        if self._closed in ready:
            raise _ClosedError
        return bool(ready)
