"""One reward function in worker processes that can be killed.

One thread a worker process takes questions from a queue, sends a few at a time and waits for each answer with a time
limit. A worker that hangs is killed, one that died is noticed; either way its question is counted as such, its other
questions go back to the queue, and a new process takes its place. Where the worker was busy with several questions at
once, nobody knows which one it was: each goes back to be judged alone. Nothing turns into a silent 0: see
Judgement.outcome.
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
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Literal

from megatron_gppo.config import RewardFunctionConfig
from megatron_gppo.datatypes import Outcome, Prompt, Response
from megatron_gppo.rollout.reward_protocol import FunctionSpec, Judgement, Question

START_TIMEOUT_S = 300.0  # for a worker to import the reward function; a cold network file system is slow
GRACE_S = 1.0  # beyond the time limit, for a worker that gives up what it awaits by itself

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """The reward function cannot be used, or its workers cannot be started. The message names the fix."""


class RewardPool:
    """Worker processes for one reward function. Usable from any thread and from one event loop after another."""

    def __init__(self, config: RewardFunctionConfig, field_name: str = "reward") -> None:
        """Starts the workers and waits until each has loaded the reward function.

        field_name: the configuration's name of the section, for messages. Raises RewardError if a worker cannot load the
        function, OSError if one cannot even be started.
        """
        self._config = config
        self._name = f"{field_name}.function = {config.function}"
        self._spec = FunctionSpec(
            config.function, config.batched, config.timeout_s, config.memory_mb, config.scope, config.after_think
        )
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

    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Judgement]:
        """The judgements of one prompt's responses, in their order.

        Raises RewardError or OSError when a worker died and no new one could be started, and when the pool is closed.
        """
        questions = [Question(response.text, prompt.ground_truth, prompt.data_source) for response in responses]
        return await self._ask([_Pending(question, prompt.row) for question in questions])

    async def read_ground_truth(self, ground_truth: str) -> Judgement:
        """math_verify only: "scored" if it can read the ground truth. Raises as judge() does."""
        (judgement,) = await self._ask([_Pending(Question(None, ground_truth, ""))])
        return judgement

    async def _ask(self, pending: "list[_Pending]") -> list[Judgement]:
        if self._close.closed:
            raise RuntimeError("the reward pool is closed")
        for one in pending:
            self._questions.put(one)
        return list(await asyncio.gather(*(asyncio.wrap_future(one.judgement) for one in pending)))

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
                        worker = _Worker(self._spec, self._name, self._closed)
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
        left = self._questions.qsize() + 1
        share = 1 if first.alone else min(self._config.batch_size, left // len(self._threads))
        while len(batch) < share:
            try:
                another = self._questions.get_nowait()
            except queue.Empty:
                break
            if another is None or another.alone:
                self._questions.put(another)
                break
            batch.append(another)
        return batch

    def _serve(self, worker: "_Worker", batch: "list[_Pending]") -> bool:
        """Has the batch judged, and says whether the worker can go on."""
        waiting = dict(enumerate(pending for pending in batch if not pending.judgement.cancelled()))
        try:
            worker.send([pending.question for pending in waiting.values()])
            while waiting:
                answer = worker.receive(self._config.timeout_s + GRACE_S * (not worker.judges_in_order))
                if not isinstance(answer, str):
                    index, judgement = answer
                    self._settle(waiting.pop(index), judgement)
                    continue
                how = f"no verdict within {self._config.timeout_s:g} s" if answer == "timeout" else "it died"
                failed = Judgement(answer, detail=f"{how}; the worker is replaced")
                if len(waiting) == 1 or worker.judges_in_order:
                    self._settle(waiting.pop(min(waiting)), failed)
                else:
                    waiting = {index: replace(pending, alone=True) for index, pending in waiting.items()}
                return False
            return True
        finally:
            for pending in waiting.values():
                self._questions.put(pending)

    def _settle(self, pending: "_Pending", judgement: Judgement) -> None:
        self._report(judgement.outcome, pending, judgement.detail)  # first: who has the verdict may look for the log
        pending.settle(judgement)

    def _report(self, outcome: Outcome, pending: "_Pending", detail: str | None) -> None:
        """Logs the first of its kind; all are counted by whoever reads the verdicts."""
        response = pending.question.response
        if detail is not None and response is not None and outcome not in self._reported:
            self._reported.add(outcome)
            logger.warning(
                "%s: first outcome %r, prompt row %d, response ending in %r: %s",
                *(self._name, outcome, pending.row, response[-100:], detail),
            )


@dataclass(frozen=True, slots=True)
class _Pending:
    question: Question
    row: int | None = None  # Prompt.row, for the log
    alone: bool = False  # judged beside no other, because one of those that it was judged with failed all
    judgement: "Future[Judgement]" = field(default_factory=Future)

    def settle(self, judgement: Judgement) -> None:
        if self.judgement.set_running_or_notify_cancel():  # false when whoever waited was cancelled
            self.judgement.set_result(judgement)

    def fail(self, error: Exception | None) -> None:
        if self.judgement.set_running_or_notify_cancel():
            self.judgement.set_exception(error)


class _ClosedError(Exception):
    """The pool was closed while a thread waited for its worker."""


class _Worker:
    """A worker process as its thread sees it."""

    def __init__(self, spec: FunctionSpec, name: str, closed: Connection) -> None:
        """Starts the process and waits until it is ready. Raises RewardError, which begins with the name, if it cannot be."""
        self._closed = closed
        self._connection, theirs = Pipe()
        # A program of its own rather than multiprocessing's spawn, which would import the trainer's main module, and
        # with it torch and Megatron. -P and PYTHONPATH: what the trainer can import, and nothing else.
        handle = theirs.fileno()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                "from megatron_gppo.rollout.reward_worker import serve, FunctionSpec; "
                f"serve({handle}, FunctionSpec(*{tuple(spec)!r}))",
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[handle],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C does not reach it, and kill() reaches what a reward function starts
        )
        theirs.close()
        try:
            self.judges_in_order = self._wait_until_ready(name)
        except BaseException:
            self.kill()
            raise

    def send(self, questions: list[Question]) -> None:
        # A worker that died while it was idle: receive() says so.
        with contextlib.suppress(OSError):
            self._connection.send(questions)

    def receive(self, timeout_s: float) -> tuple[int, Judgement] | Literal["timeout", "crash"]:
        """The next judgement and its index; "timeout" or "crash" when there is none, after which only kill() makes sense.

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

    def _wait_until_ready(self, name: str) -> bool:
        """Whether the worker judges one question after the other."""
        if not self._wait(START_TIMEOUT_S):
            raise RewardError(
                f"{name}: a worker was not ready after {START_TIMEOUT_S:g} s. Fix: make its import quicker"
            )
        try:
            answer: bool | str = self._connection.recv()
        except (EOFError, OSError):
            raise RewardError(
                f"{name}: a worker ended while it started, with exit status {self._process.wait()}. Fix: see its output above"
            ) from None
        if isinstance(answer, str):
            raise RewardError(f"{name}: {answer}")
        return answer

    def _wait(self, timeout_s: float) -> bool:
        """Whether there is something to receive before the time is over."""
        ready = wait([self._connection, self._closed], timeout_s)
        if self._closed in ready:
            raise _ClosedError
        return bool(ready)
