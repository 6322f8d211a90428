"""Requests to engines as their slots free up, away from engines that fail.

What holds, and is tested: an engine is sent a request while fewer than `concurrency` responses are in flight to it, and no
request waits while that is so; all responses of one request come from one engine; a request whose engine dies, hangs or
answers nonsense starts anew on another; an engine that was lost gets no request; when a piece of work fails, is cancelled
or has enough, nothing of it goes on in the engines.

Behind the router, `concurrency` is a mean over the engines, and a request that fails is nobody's fault that can be named.
Sent through the router again it would reach the same engine: that one has its prompt cached. So from the first such failure
on, the Dispatcher sends everything to the engines directly, which loses the one at fault as soon as it fails again. It need
not be that request which finds it; what is still in flight behind the router then comes on top of `concurrency`. The next
Dispatcher begins with the router again.
"""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

from megatron_gppo.config import RolloutConfig, SamplingConfig
from megatron_gppo.datatypes import Response
from megatron_gppo.rollout.engine import Engine, EngineError, EngineFaultError, MalformedAnswerError
from megatron_gppo.rollout.pieces import Staleness

WATCH_INTERVAL_S = 1.0
HEALTH_INTERVAL_S = 15.0
HEALTH_RETRY_S = 2.0

Prospect = Literal["needs weights", "starting"]


class EnginesNeedWeights(Exception):  # noqa: N818 - asked for, so not an error
    """No engine serves, but one is up and waits for the current weights: sync, and go on."""


class EngineSource(Protocol):
    """Which engines there are (pool.EnginePool)."""

    def serving(self) -> Sequence[Engine]:
        """Those that may generate: healthy, with the current weights."""

    def front(self) -> Engine | None:
        """The router that stands in front of all that serve, if there is one."""

    def lost(self, url: str, why: str) -> None:
        """This one failed. Returns at once; it serves no more until it was restarted and given the weights."""

    def prospect(self) -> Prospect:
        """What to wait for when none serves. Raises EngineError when none comes back."""

    def quiet_since(self) -> float:
        """Since when (time.monotonic()) no weight sync has been under way; infinity while one is."""

    def take_counts(self) -> Mapping[str, int]:
        """Events since the last call, and how many serve now."""


class Dispatcher:
    """Sends requests to engines, within one event loop: use as an async context manager, or through all()."""

    def __init__(self, engines: EngineSource, config: RolloutConfig, *, concurrency: int) -> None:
        self._engines = engines
        self._concurrency = concurrency
        self._health_timeout_s = config.health_timeout_s
        self._max_moves = config.max_retries
        self._past_router = False  # since something failed behind it
        self._random = random.Random()  # its own: the state of the common one is in checkpoints
        self._in_flight: Counter[Engine] = Counter()  # responses that are asked for
        self._lost: dict[Engine, asyncio.Future[str]] = {}  # of engines in use: set to the reason when they are lost
        self._connected: list[Engine] = []
        self._changed = asyncio.Condition()
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Dispatcher":
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._watcher is not None
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        for engine in self._connected:
            await engine.disconnect()
        self._connected.clear()

    async def all(self, work: Sequence[Coroutine[Any, Any, Any]], enough: Callable[[], bool] = lambda: False) -> None:
        """Runs coroutines that call generate() until all are done or, asked after each, there is enough.

        When one fails, or the whole is cancelled, the others end too, in the engines as well. EnginesNeedWeights is raised
        after those that can be finished without an engine are.
        """
        async with self:
            tasks = [asyncio.create_task(coroutine) for coroutine in work]
            try:
                needs_weights = await _outcome(tasks, enough)
            except BaseException:
                await _end(tasks)
                await asyncio.gather(*(self._abort(engine) for engine in self._engines.serving()))
                raise
            await _end(tasks)
            if needs_weights is not None and not enough():
                raise needs_weights

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingConfig,
        n: int,
        policy_version: int | None,
        counts: Counter[str],
        staleness: Staleness | None = None,
    ) -> list[Response]:
        """n responses to one prompt, all from one engine and, unless None, from weights of this version, or of one that is
        no older than `staleness` allows.

        Adds to counts "moved_requests", "malformed_answers" and what Engine.generate does. Raises EngineError when the
        request is rejected, or fails on engine after engine, or none is left; and EnginesNeedWeights.
        """
        failed_engines = 0
        while True:
            engine = await self._slot(n)
            through_router = engine is self._engines.front()
            try:
                responses = await self._generate_on(engine, prompt_ids, sampling, n, counts, staleness)
                if policy_version is not None:
                    _check_versions(engine, responses, policy_version, staleness.versions if staleness else 0)
                return responses
            except EngineFaultError as fault:
                counts["malformed_answers"] += isinstance(fault, MalformedAnswerError)
                self._faulty(engine, str(fault))
                failed_engines += not through_router
                if failed_engines > self._max_moves:
                    raise EngineError(
                        f"a request failed on {failed_engines} engines, one after the other (rollout.max_retries); the last: {fault}"
                    ) from fault
            finally:
                self._in_flight[engine] -= n
                async with self._changed:
                    self._changed.notify()
            counts["moved_requests"] += 1

    async def _slot(self, n: int) -> Engine:
        """An engine that may be sent more, and now has n responses more in flight: that with fewest.

        Of several at random: always the first would leave a bad one behind the router unasked, where little is asked.
        """
        async with self._changed:
            while True:
                serving = self._engines.serving()
                if not serving and self._engines.prospect() == "needs weights":
                    raise EnginesNeedWeights
                front = None if self._past_router else self._engines.front()
                usable = [front] if front is not None and serving else serving
                at_most = self._concurrency * len(serving) if front is not None else self._concurrency
                free = [engine for engine in usable if self._in_flight[engine] < at_most]
                if free:
                    engine = min(free, key=lambda engine: (self._in_flight[engine], self._random.random()))
                    self._in_flight[engine] += n
                    if len(free) > 1 or self._in_flight[engine] < at_most:
                        self._changed.notify()  # a large request that ended has made room for several small ones
                    break
                await self._changed.wait()
        await self._connect(engine)
        return engine

    async def _generate_on(
        self,
        engine: Engine,
        prompt_ids: list[int],
        sampling: SamplingConfig,
        n: int,
        counts: Counter[str],
        staleness: Staleness | None,
    ) -> list[Response]:
        lost = self._lost.setdefault(engine, asyncio.get_running_loop().create_future())
        call = asyncio.create_task(engine.generate(prompt_ids, sampling, n, counts, staleness))
        try:
            either: set[asyncio.Future[Any]] = {call, lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise EngineFaultError(lost.result())
            return call.result()
        finally:
            await _end([call])

    def _faulty(self, engine: Engine, why: str) -> None:
        """Takes an engine out of use, and ends all that is under way on it."""
        if engine is self._engines.front():
            try:
                assert engine.process is not None
                engine.process.check()
            except EngineFaultError as ended:
                self._engines.lost(engine.url, str(ended))
            else:
                self._pass_router(why)
                return
        elif engine in self._engines.serving():
            self._engines.lost(engine.url, why)
        if (lost := self._lost.get(engine)) is not None and not lost.done():
            lost.set_result(why)

    def _pass_router(self, why: str) -> None:
        """See the module."""
        if not self._past_router:
            self._past_router = True
            print(
                f"warning: a request failed behind sglang-router, which does not say on which engine; for the rest of this "
                f"rollout or evaluation prompts go to the engines directly: {why}",
                file=sys.stderr,
                flush=True,
            )

    async def _watch(self) -> None:
        """Finds engines that have ended or hang. Also lets requests look again for engines, which may come back."""
        checks: dict[Engine, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                for engine in self._engines.serving():
                    try:
                        if engine.process is not None:
                            engine.process.check()
                    except EngineError as ended:
                        self._faulty(engine, str(ended))
                        continue
                    if engine not in checks or checks[engine].done():
                        checks[engine] = asyncio.create_task(self._check_health(engine))
                for engine in self._given_up():
                    self._faulty(engine, f"{engine.url}: lost in a weight sync")
                async with self._changed:
                    self._changed.notify_all()
        finally:
            await _end(list(checks.values()))

    def _given_up(self) -> list[Engine]:
        """Engines that others found faulty, and that may never answer what is in flight there."""
        known = [*self._engines.serving(), self._engines.front()]
        return [engine for engine, responses in self._in_flight.items() if responses and engine not in known]

    async def _check_health(self, engine: Engine) -> None:
        """One check, after a while. An engine without work is left alone: it may be sleeping. So is one that was given
        weights meanwhile: paused for that, it cannot succeed.
        """
        await asyncio.sleep(HEALTH_INTERVAL_S)
        if not self._in_flight[engine] and self._engines.front() is None:
            return
        await self._connect(engine)
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._health_timeout_s):
                while not await engine.healthy():
                    await asyncio.sleep(HEALTH_RETRY_S)
        except TimeoutError:
            if self._engines.quiet_since() > start:
                return
            self._faulty(
                engine,
                f"{engine.url}: no health check succeeded within rollout.health_timeout_s = {self._health_timeout_s:g} s",
            )

    async def _connect(self, engine: Engine) -> None:
        if engine not in self._connected:
            self._connected.append(engine)
            await engine.connect()

    async def _abort(self, engine: Engine) -> None:
        await self._connect(engine)
        await engine.abort()


def _check_versions(engine: Engine, responses: Sequence[Response], newest: int, staleness: int) -> None:
    """Raises EngineFaultError for a token of weights that are newer than the policy, or older than allowed."""
    oldest = newest - staleness
    for response in responses:
        for version in (min(response.policy_versions), max(response.policy_versions)):
            if not oldest <= version <= newest:
                has = f"has version {newest}" + (f", and async.staleness allows {oldest}" if staleness else "")
                raise EngineFaultError(
                    f"{engine.url}: generated by weights of version {version}, the policy {has}. "
                    "Fix: let nobody else push weights to this server, or restart it"
                )


async def _outcome(tasks: Sequence[asyncio.Task[Any]], enough: Callable[[], bool]) -> EnginesNeedWeights | None:
    """Returns when all are done or there is enough, with what was raised for want of weights. Raises the first other error."""
    needs_weights: EnginesNeedWeights | None = None
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = len(tasks)

    def look(task: asyncio.Task[Any]) -> None:
        nonlocal needs_weights, left
        left -= 1
        if over.done() or task.cancelled():
            return
        error = task.exception()
        if isinstance(error, EnginesNeedWeights):
            needs_weights = error
        elif error is not None:
            over.set_exception(error)
            return
        if left == 0 or enough():
            over.set_result(None)

    for task in tasks:
        task.add_done_callback(look)
    if tasks and not enough():
        await over
    return needs_weights


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
