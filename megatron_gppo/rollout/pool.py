"""All engines of a run, on rank 0: which may generate, which wait for weights, which are being brought back.

    starting -> waiting (up, without the current weights) -> serving -> lost: starting again, or gone for good

An engine serves only after a sync named it (synced()), whether it has just been started or came back from a failure. One
that is lost is ended and started again in a thread of its own, after a growing pause, at most rollout.max_restarts times
in a run; an external one is waited for instead, as often.
"""

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_gppo.config import RolloutConfig
from megatron_gppo.http_calls import HttpCallError, call
from megatron_gppo.rollout.dispatch import Prospect
from megatron_gppo.rollout.engine import Engine, EngineError, EngineFaultError
from megatron_gppo.rollout.hosts import EngineHost
from megatron_gppo.rollout.router import Router
from megatron_gppo.rollout.server import make_engine

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
POLL_S = 0.5
MEMORY_TIMEOUT_S = 300.0
THREAD_TIMEOUT_S = 60.0
MEMORY = ["kv_cache", "weights", "cuda_graph"]  # SGLang's tags for all that it can give back


@dataclass(eq=False)
class _Member:
    host: EngineHost
    state: Literal["starting", "waiting", "serving", "gone"] = "starting"
    engine: Engine | None = None  # None until it is up
    restarts: int = 0
    came_back: bool = False  # and was given no weights yet
    coming_up: bool = False  # a restarted one
    memory_released: bool = False
    thread: threading.Thread | None = field(default=None, repr=False)


class EnginePool:
    """See the module. Every method may be called from any thread, and none but wait_ready and to_sync waits for an engine.

    needs_weights: False where engines generate with the weights that they load themselves (evaluation of a model's files).
    """

    def __init__(
        self,
        config: RolloutConfig,
        hosts: Sequence[EngineHost],
        *,
        needs_weights: bool = True,
        start_router: Callable[[], Router] | None = None,
    ) -> None:
        self._config = config
        self._needs_weights = needs_weights
        self._members = [_Member(host) for host in hosts]
        self._counts: Counter[str] = Counter()
        self._why = "none was started"  # the latest loss
        self._quiet_since = -math.inf
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._cancelled = False
        self._may_start = threading.Event()  # not while the policy has the GPUs to itself
        self._may_start.set()
        self._router: Router | None = None
        try:
            for member in self._members:
                member.host.start()
            if start_router is not None:
                self._router = start_router()
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Returns when all engines have come up. Raises EngineError when one does not: at the start nothing is forgiven."""
        for member in self._members:
            self._is_up(member, member.host.wait_ready())
        if self._router is not None:
            self._router.wait_ready()
        self._tell_router()

    def serving(self) -> list[Engine]:
        """Engines that may generate."""
        return self._engines("serving")

    def front(self) -> Engine | None:
        """The router, while there is one."""
        return self._router.engine if self._router is not None else None

    def prospect(self) -> Prospect:
        """What there is to wait for when none serves. Raises EngineError when nothing is."""
        with self._lock:
            states = {member.state for member in self._members}
            if "serving" not in states and "waiting" in states:
                return "needs weights"
            if states & {"starting", "serving"}:  # one may serve since the caller looked
                return "starting"
            raise EngineError(
                f"no engine is left: each has been started again rollout.max_restarts = {self._config.max_restarts} times, or does "
                f"not come back. The last that was lost: {self._why}"
            )

    def quiet_since(self) -> float:
        """When the last weight sync ended (time.monotonic()); infinity while one is under way."""
        return self._quiet_since

    def take_counts(self) -> dict[str, int]:
        """lost_engines, lost_routers and restarted_engines (served again) since the last call, and serving_engines now."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            return dict(counts) | {"serving_engines": len(self.serving())}

    # What a weight sync needs.

    def to_sync(self, on_progress: Callable[[], None] = lambda: None) -> list[str]:
        """URLs of all engines that are up. Waits only if none is, but one is being started; raises EngineError if none is either.

        Calls on_progress with every attempt to start one: their number is limited. Empty after cancel(), where it would wait.
        """
        starts = self._starts()
        while True:
            self._find_ended()
            if urls := [engine.url for engine in self._engines("serving", "waiting")]:
                self._quiet_since = math.inf
                return urls
            if self._cancelled:
                return []
            self.prospect()
            self._may_start.set()  # colocated: the policy has done its training
            if starts != (starts := self._starts()):
                on_progress()
            time.sleep(POLL_S)

    def cancel(self) -> None:
        """Has to_sync, now and later, not wait. Safe to call from a signal handler."""
        self._cancelled = True

    def gpus(self, url: str) -> list[int]:
        """Which GPUs of its node the engine was shown; empty for all."""
        with self._lock:
            members = [of for of in self._members if of.engine is not None and of.engine.url == url]
            return members[0].host.gpus if members else []

    def synced(self, urls: Sequence[str], version: int) -> None:
        """These hold the weights of this version, and serve."""
        with self._lock:
            self._quiet_since = time.monotonic()
            for member in self._members:
                if member.engine is not None and member.engine.url in urls and member.state == "waiting":
                    member.state = "serving"
                    if member.came_back:
                        member.came_back = False
                        self._counts["restarted_engines"] += 1
                        _say(f"the engine at {member.engine.url} serves again, with weights of version {version}")
        self._tell_router()

    def lost(self, url: str, why: str) -> None:
        """This engine failed: it serves no more, and is brought back in the background. Returns at once."""
        with self._lock:
            if self._router is not None and url == self._router.url:
                self._drop_router(why)
            for member in self._members:
                if member.engine is not None and member.engine.url == url and member.state in ("waiting", "serving"):
                    self._lose(member, why)
        self._tell_router()

    # Colocated placement.

    def release_memory(self) -> None:
        """Has every engine give back its GPU memory, weights and KV cache. What it was generating is aborted, and what it is
        asked from now on waits: until a sync ends.

        One that is coming up at this moment takes its memory first, and is waited for; no other is started meanwhile.
        """
        with self._lock:
            self._may_start.clear()
        while any(member.coming_up for member in self._members):
            time.sleep(POLL_S)
        self._on_all(self._release)

    def resume_memory(self) -> None:
        """Gives engines their memory, with undefined weights, before the sync. All of it: what waits goes on as soon as they
        have the weights, and needs the KV cache.
        """
        self._on_all(self._resume)
        self._may_start.set()

    def close(self) -> None:
        """Ends all engines that are ours."""
        self._closing.set()
        self._may_start.set()
        closers = [threading.Thread(target=member.host.close) for member in self._members]
        for thread in closers:  # at once: each takes seconds
            thread.start()
        if self._router is not None:
            self._router.close()
        for thread in [*closers, *(member.thread for member in self._members if member.thread is not None)]:
            thread.join(THREAD_TIMEOUT_S)

    def _starts(self) -> int:
        with self._lock:
            return sum(member.restarts for member in self._members)

    def _engines(self, *states: str) -> list[Engine]:
        with self._lock:
            return [of.engine for of in self._members if of.state in states and of.engine is not None]

    def _is_up(self, member: _Member, url: str) -> None:
        with self._lock:
            member.engine = make_engine(self._config, url, member.host if member.host.managed else None)
            member.memory_released = member.coming_up = False
            member.state = "waiting" if self._needs_weights else "serving"

    def _find_ended(self) -> None:
        with self._lock:
            for member in self._members:
                if member.state in ("waiting", "serving"):
                    try:
                        member.host.check()
                    except EngineFaultError as error:
                        self._lose(member, str(error))

    def _lose(self, member: _Member, why: str) -> None:
        assert member.engine is not None
        self._counts["lost_engines"] += 1
        self._why = why
        comes_back = member.restarts < self._config.max_restarts
        member.state = "starting" if comes_back else "gone"
        _say(f"lost the engine at {member.engine.url}: {why}")
        target = self._bring_back if comes_back else lambda member: member.host.close()
        member.thread = threading.Thread(target=target, args=(member,), name="engine restart", daemon=True)
        member.thread.start()

    def _bring_back(self, member: _Member) -> None:
        """Runs in the member's thread. At most max_restarts starts, over the whole run."""
        while not self._closing.is_set():
            self._closing.wait(min(FIRST_PAUSE_S * 2**member.restarts, MAX_PAUSE_S))
            self._may_start.wait()
            with self._lock:
                if not self._may_start.is_set():  # any more
                    continue
                member.coming_up = True
            member.restarts += 1
            try:
                if self._closing.is_set():
                    return
                member.host.start()
                url = member.host.wait_ready()
            except Exception as error:  # whatever it is, the engine is not there
                with self._lock:
                    member.coming_up = False
                    self._why = str(error)
                    if not member.host.managed or member.restarts >= self._config.max_restarts:
                        member.state = "gone"
                if not self._closing.is_set():
                    _say(
                        f"an engine did not come back ({'given up' if member.state == 'gone' else 'will try again'}): {error}"
                    )
                if member.state == "gone":
                    return
                continue
            self._is_up(member, url)
            with self._lock:
                member.came_back = self._needs_weights
                self._counts["restarted_engines"] += not self._needs_weights
            self._tell_router()
            return

    def _on_all(self, action: Callable[[Engine, _Member], None]) -> None:
        """Side by side, for those that are up. One that fails is lost."""

        def run(engine: Engine, member: _Member) -> None:
            try:
                action(engine, member)
            except EngineFaultError as error:
                self.lost(engine.url, str(error))

        self._find_ended()
        with self._lock:
            up = [
                (of.engine, of) for of in self._members if of.state in ("waiting", "serving") and of.engine is not None
            ]
        threads = [threading.Thread(target=run, args=pair) for pair in up]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _release(self, engine: Engine, member: _Member) -> None:
        # It must have nothing to do, a health check included: SGLang takes a release while it is working for a bug of its own,
        # and ends. A pause also keeps out what is on its way there, such as a request that was sent and cut off.
        self._call(engine, "/pause_generation", {"mode": "abort"})
        deadline = time.monotonic() + MEMORY_TIMEOUT_S
        while True:
            try:
                self._call(engine, "/flush_cache", {})  # refused while it works
                break
            except EngineFaultError:
                member.host.check()
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
        self._call(engine, "/release_memory_occupation", {"tags": MEMORY})
        member.memory_released = True

    def _resume(self, engine: Engine, member: _Member) -> None:
        if member.memory_released:
            self._call(engine, "/resume_memory_occupation", {"tags": MEMORY})
            member.memory_released = False

    def _call(self, engine: Engine, path: str, body: dict[str, Any]) -> None:
        try:
            call(engine.url, path, self._config.api_key, body, timeout_s=MEMORY_TIMEOUT_S)
        except HttpCallError as error:
            raise EngineFaultError(str(error)) from error

    def _tell_router(self) -> None:
        with self._lock:
            if self._router is not None:
                try:
                    self._router.set_workers({engine.url for engine in self.serving()})
                except EngineFaultError as error:
                    self._drop_router(str(error))

    def _drop_router(self, why: str) -> None:
        """Generation is possible without it."""
        _say(f"lost sglang-router; prompts go to the engines directly from now on: {why}")
        self._counts["lost_routers"] += 1
        assert self._router is not None
        self._router.close()
        self._router = None


def _say(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr, flush=True)
