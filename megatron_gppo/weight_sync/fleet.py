"""The engines that one sync goes to, called side by side. Runs on rank 0 only.

Calls run in daemon threads and end by their own time limits. An engine that fails one leaves the fleet, with the phase and
its words kept, and the others go on; only when none is left is that an error.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, Protocol, TypeVar

from megatron_gppo.weight_sync.endpoint import NoAnswerError, WeightEndpoint, WeightSyncError

T = TypeVar("T")
Calls = Mapping[WeightEndpoint, Future[T]]


class EnginesGoneError(WeightSyncError):
    """No engine is left, and not because of what they were sent: one at least has ended or hangs, and may come back."""


class SyncedEngines(Protocol):
    """Who runs the engines, as weight sync sees them. Rank 0 only; no other method than to_sync may block for long."""

    def to_sync(self, on_progress: Callable[[], None]) -> list[str]:
        """URLs of all engines that are up, those included that wait for weights before they may serve.

        Waits where none is up but one is coming up, calling on_progress with every attempt. Raises where none is
        either. Empty when the run is asked to end meanwhile.
        """

    def gpus(self, url: str) -> Sequence[int]:
        """Those of the engine's TP ranks, as the trainer's ranks on its machine count them; empty if it was shown all."""

    def synced(self, urls: Sequence[str], version: int) -> None:
        """These hold the weights of this version, and may serve."""

    def lost(self, url: str, why: str) -> None:
        """This one failed in a sync, and holds nobody knows what."""


class Fleet:
    """Engines that have not failed, and why the others did."""

    def __init__(self, endpoints: Sequence[WeightEndpoint], failed_before: Mapping[str, str] | None = None) -> None:
        """`failed_before`: engines that are not in the fleet, and whose failures the error repeats when none is left."""
        self.endpoints = list(endpoints)
        self.failed: dict[str, str] = {}  # URL -> phase and cause
        self._any_gone = False
        self._failed_before = failed_before or {}
        self.require_one()

    def on_all(self, phase: str, call: Callable[[WeightEndpoint], T]) -> dict[WeightEndpoint, T]:
        """What `call` returns for every engine that does not fail. Raises WeightSyncError when all have failed."""
        return self.finish(phase, self.start(call))

    def start(self, call: Callable[[WeightEndpoint], T]) -> Calls[T]:
        return {endpoint: in_thread(call, endpoint) for endpoint in self.endpoints}

    def finish(self, phase: str, calls: Calls[T]) -> dict[WeightEndpoint, T]:
        """Waits for all calls. Like on_all."""
        wait(calls.values())
        self.lose_failed(phase, calls)
        return {endpoint: calls[endpoint].result() for endpoint in self.endpoints if endpoint in calls}

    def lose_failed(self, phase: str, calls: Calls[Any]) -> None:
        """Takes the engines out whose calls have failed by now."""
        for endpoint, call in calls.items():
            if call.done() and (error := call.exception()) is not None:
                self.lose(endpoint, phase, error)
        self.require_one()

    def lose(self, endpoint: WeightEndpoint, phase: str, error: BaseException) -> None:
        if endpoint in self.endpoints:
            self.endpoints.remove(endpoint)
            self._any_gone |= isinstance(error, NoAnswerError)
            cause = str(error) if isinstance(error, WeightSyncError) else repr(error)
            named = cause if endpoint.url in cause else f"{endpoint.url}: {cause}"
            self.failed[endpoint.url] = f"phase '{phase}': {named}"

    def require_one(self) -> None:
        if not self.endpoints:
            causes = [*self._failed_before.values(), *self.failed.values()]
            kind = EnginesGoneError if self._any_gone else WeightSyncError
            raise kind(f"weight sync: no engine is left; {'; '.join(causes) or 'there was none'}")


def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
    """Runs it in a daemon thread, which, unlike an executor's, does not keep a failing process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
