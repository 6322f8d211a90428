"""Rollouts that are generated while the loop trains on earlier ones.

    next(k) of the loop:  waits for the rollout of step k, and lets those of the steps up to k + staleness begin
    a thread:             generates one step's rollout after another, on the source it was given

What holds, and is tested: a step's rollout begins only when the engines hold weights at most `staleness` versions older than
those that the step starts from, because the loop asks for step k when they hold version k - 1, and weights only get newer
while it is generated. Rollouts come in the order of their steps, and so take their prompts in that order: the data position
of a rollout is that of a run without this class. A failure is raised by the next() that would have returned the rollout.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_gppo.datatypes import Rollout
from megatron_gppo.rollout.dispatch import EnginesNeedWeights
from megatron_gppo.rollout.generate import RolloutCancelled, RolloutSource

# Whoever waits looks for cancel() so often: a signal handler must not take the lock that wakes it.
POLL_S = 0.05
CLOSE_TIMEOUT_S = 30.0


class AheadRollouts:
    """Rollouts of another source, generated up to `staleness` steps ahead of the loop. See RolloutSource.

    last_step: none is generated after it. The thread starts with the first next(); call close() at the end.
    """

    def __init__(self, source: RolloutSource, *, staleness: int, last_step: int) -> None:
        assert staleness >= 1
        self._source = source
        self._staleness = staleness
        self._last_step = last_step
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._cancelled = False
        # The rest is for whoever holds this.
        self._changed = threading.Condition()
        self._next_step = 0  # to be generated
        self._newest_step = -1  # that may be generated
        self._generating = False
        self._pauses = 0
        self._done: dict[int, Rollout] = {}
        self._failure: BaseException | None = None  # of _next_step

    def next(self, step: int, policy_version: int) -> Rollout:
        """The rollout of a step, when the engines hold the weights that it starts from. Steps come one after another.

        Raises what the source raises. After that the same step can be asked for again, and the source, too.
        """
        assert policy_version == step - 1
        with self._changed:
            if self._thread.ident is None:
                self._next_step = step
                self._thread.start()
            if isinstance(self._failure, EnginesNeedWeights):
                self._failure = None  # they may have been synced since
            self._newest_step = min(step + self._staleness, self._last_step)
            self._changed.notify_all()
            while True:
                if self._cancelled:
                    raise RolloutCancelled
                if step in self._done:
                    return self._done.pop(step)
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                self._changed.wait(POLL_S)

    def cancel(self) -> None:
        self._cancelled = True
        self._source.cancel()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the context is open nothing is generated. Entering it waits for the rollout that is being generated."""
        with self._changed:
            self._pauses += 1
        try:
            with self._changed:
                while self._generating:
                    self._changed.wait(POLL_S)
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Ends generation, in the engines too, and the thread. Can be called again."""
        self.cancel()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (step := self._begin()) is not None:
            rollout: Rollout | None = None
            failure: BaseException | None = None
            try:
                rollout = self._source.next(step, step - 1)
            except BaseException as error:  # next() raises it, in the thread that can end the run
                failure = error
            with self._changed:
                self._generating = False
                if rollout is not None:
                    self._done[step] = rollout
                    self._next_step = step + 1
                self._failure = failure
                self._changed.notify_all()

    def _begin(self) -> int | None:
        """The step to generate, as soon as there is one; None when it is over."""

        def may_begin() -> bool:
            allowed = self._next_step <= self._newest_step and self._pauses == 0 and self._failure is None
            return self._cancelled or allowed

        with self._changed:
            self._changed.wait_for(may_begin)
            if self._cancelled:
                return None
            self._generating = True
            return self._next_step
