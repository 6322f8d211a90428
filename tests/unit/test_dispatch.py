"""Requests over engines that fail: the invariants of Dispatcher, with engines that are ours."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_gppo.config import SamplingConfig
from megatron_gppo.datatypes import Prompt, Response
from megatron_gppo.rollout import dispatch as dispatch_module
from megatron_gppo.rollout.dispatch import Dispatcher, EnginesNeedWeights
from megatron_gppo.rollout.engine import Engine, EngineError, EngineFaultError, MalformedAnswerError
from megatron_gppo.rollout.generate import EngineRollouts
from megatron_gppo.rollout.lengths import ResponseLengths
from tests.support.fake_engine import CountingPrompts, FakeEngine, FakeJudge, FixedEngines, ReturningEngines
from tests.support.rollout import make_config

SAMPLING = SamplingConfig()


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WATCH_INTERVAL_S", "HEALTH_INTERVAL_S", "HEALTH_RETRY_S"):
        monkeypatch.setattr(dispatch_module, name, 0.01)


class FailingEngine(FakeEngine):
    """Raises the error, or never answers if it is None, for every prompt after the first `good` ones."""

    def __init__(self, url: str, error: Exception | None = None, good: int = 0, healthy: bool = True) -> None:
        super().__init__(url)
        self.error, self.good, self.is_healthy = error, good, healthy

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingConfig, n: int, counts: Any, staleness: Any = None
    ) -> list[Response]:
        if self.finished < self.good:
            return await super().generate(prompt_ids, sampling, n, counts)
        if self.error is not None:
            raise self.error
        self.in_flight += 1
        try:
            await asyncio.sleep(3600)
        finally:
            self.in_flight -= 1
        raise AssertionError

    async def healthy(self) -> bool:
        return self.is_healthy


def run(
    engines: FixedEngines,
    prompts: int,
    *,
    concurrency: int = 2,
    enough: Callable[[int], bool] = lambda done: False,
    policy_version: int | None = None,
    **rollout: Any,
) -> tuple[dict[int, list[Response]], Counter[str]]:
    """Two responses to each prompt, by prompt, and the counts."""
    config = make_config(Path("unused"), Path("unused"), **rollout).rollout
    counts: Counter[str] = Counter()
    found: dict[int, list[Response]] = {}

    async def one(dispatcher: Dispatcher, row: int) -> None:
        found[row] = await dispatcher.generate([row], SAMPLING, 2, policy_version, counts)

    async def everything() -> None:
        dispatcher = Dispatcher(engines, config, concurrency=2 * concurrency)
        await dispatcher.all([one(dispatcher, row) for row in range(prompts)], lambda: enough(len(found)))

    asyncio.run(everything())
    return found, counts


class Process:
    """One that runs until it is told that it ended."""

    def __init__(self, ended: str | None = None) -> None:
        self.ended = ended

    def check(self) -> None:
        if self.ended is not None:
            raise EngineFaultError(self.ended)


class PinningRouter(FakeEngine):
    """Sends a prompt to the same engine every time, as a cache-aware router does, for as long as that one serves."""

    def __init__(self, engines: FixedEngines) -> None:
        super().__init__("http://router")
        self.engines = engines
        self.process: Process = Process()

    async def generate(self, prompt_ids: list[int], *args: Any) -> list[Response]:
        if self.process.ended is not None:
            raise EngineFaultError("no connection")
        workers = self.engines.serving()
        return await workers[prompt_ids[0] % len(workers)].generate(prompt_ids, *args)


class RoutedEngines(FixedEngines):
    """Behind a router, while it is not lost."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(engines)
        self.router = PinningRouter(self)

    def front(self) -> Engine | None:
        return None if self.router.url in self.reasons else self.router


@pytest.mark.parametrize(
    "error", [EngineFaultError("it died"), MalformedAnswerError("NaN")], ids=["dies", "answers nonsense"]
)
def test_requests_of_a_failed_engine_begin_anew_on_another(error: EngineFaultError) -> None:
    good, bad = FakeEngine("http://good"), FailingEngine("http://bad", error, good=3)
    engines = FixedEngines([good, bad])
    found, counts = run(engines, 30)
    assert sorted(found) == list(range(30))
    assert good.finished + bad.finished == 30
    assert bad.finished in (3, 4), "two at a time"
    assert engines.reasons == {"http://bad": str(error)}, "reported once"
    assert counts["moved_requests"] >= 1
    assert (counts["malformed_answers"] > 0) == isinstance(error, MalformedAnswerError)


def test_a_hung_engine_is_noticed_by_its_health() -> None:
    good, hung = FakeEngine("http://good"), FailingEngine("http://hung", healthy=False)
    engines = FixedEngines([good, hung])
    found, counts = run(engines, 10, health_timeout_s=0.1)
    assert sorted(found) == list(range(10))
    assert "no health check succeeded within rollout.health_timeout_s = 0.1 s" in engines.reasons["http://hung"]
    assert counts["moved_requests"] == 2, "both that were in flight there"
    assert hung.in_flight == 0


def test_an_engine_that_is_given_weights_cannot_be_healthy_and_is_not_hung() -> None:
    class Syncing(FixedEngines):
        looks = 0

        def quiet_since(self) -> float:
            """Under way for as long as two checks take."""
            self.looks += 1
            return math.inf if self.looks <= 2 else -math.inf

    engines = Syncing([FakeEngine("http://good"), FailingEngine("http://paused", healthy=False)])
    found, _ = run(engines, 10, health_timeout_s=0.1)
    assert sorted(found) == list(range(10))
    assert list(engines.reasons) == ["http://paused"], "as hung, after the sync"
    assert engines.looks == 3


def test_a_slow_engine_that_is_healthy_is_waited_for() -> None:
    class Slow(FakeEngine):
        async def generate(self, *args: Any) -> list[Response]:
            await asyncio.sleep(0.5)
            return await super().generate(*args)

    engines = FixedEngines([Slow()])
    found, counts = run(engines, 1, health_timeout_s=0.1)
    assert list(found) == [0]
    assert not engines.reasons
    assert not counts["moved_requests"]


def test_the_death_of_a_process_ends_what_it_was_asked() -> None:
    good, dead = FakeEngine("http://good"), FailingEngine("http://dead")
    dead.process = Process("ended with status 137")
    engines = FixedEngines([good, dead])
    found, _ = run(engines, 10)
    assert sorted(found) == list(range(10))
    assert engines.reasons == {"http://dead": "ended with status 137"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (FailingEngine("http://bad", MalformedAnswerError("NaN")), "NaN"),
        (FailingEngine("http://bad", EngineFaultError("HTTP 500")), "HTTP 500"),
        (
            FakeEngine("http://bad", version=3),
            "http://bad: generated by weights of version 3, the policy has version 4.",
        ),
    ],
    ids=["nonsense", "fails", "old weights"],
)
def test_the_engine_behind_the_router_that_is_at_fault_is_found(
    bad: FakeEngine, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = FakeEngine("http://good", version=4)
    engines = RoutedEngines([good, bad])
    found, counts = run(engines, 30, policy_version=4)
    assert sorted(found) == list(range(30))
    assert {response.policy_versions[0] for responses in found.values() for response in responses} == {4}
    assert list(engines.reasons) == ["http://bad"], "lost by what it answered when it was asked directly"
    assert engines.reasons["http://bad"].startswith(why)
    assert counts["moved_requests"] >= 2
    assert capsys.readouterr().err.count("for the rest of this rollout or evaluation prompts go to the engines") == 1


def test_a_request_that_an_engine_behind_the_router_spoils_does_not_have_to_find_which() -> None:
    """A healthy engine, asked directly, ends the matter for it. The bad one gets its turn in a later rollout at the latest."""
    good, bad = FakeEngine("http://good"), FailingEngine("http://bad", MalformedAnswerError("NaN"))
    engines = RoutedEngines([bad, good])
    rollouts = 0
    while not engines.reasons:
        found, counts = run(engines, 1, max_retries=1)
        assert list(found) == [0]
        assert counts["moved_requests"] == 1 + len(engines.reasons)
        rollouts += 1
        assert rollouts < 100, "ties between engines are broken at random"
    assert list(engines.reasons) == ["http://bad"]


def test_what_failed_through_the_router_counts_for_no_engine() -> None:
    engines = RoutedEngines([FailingEngine(f"http://{n}", MalformedAnswerError("NaN")) for n in range(5)])
    with pytest.raises(EngineError, match=r"failed on 2 engines, one after the other .*NaN"):
        run(engines, 1, max_retries=1)
    assert len(engines.reasons) == 2


def test_a_router_that_has_ended_is_lost_and_no_engine_is(capsys: pytest.CaptureFixture[str]) -> None:
    engines = RoutedEngines([FakeEngine("http://a"), FakeEngine("http://b")])
    engines.router.process.ended = "ended with status 1"
    found, _ = run(engines, 10, max_retries=0)
    assert sorted(found) == list(range(10))
    assert engines.reasons == {"http://router": "ended with status 1"}
    assert not capsys.readouterr().err, "the pool says so"


def test_a_rejected_request_is_nobodys_fault() -> None:
    engines = FixedEngines([FakeEngine("http://a", fails_on=3), FakeEngine("http://b", fails_on=3)])
    with pytest.raises(EngineError, match="prompt 3 failed"):
        run(engines, 10)
    assert not engines.reasons


def test_a_request_on_which_all_engines_fail_ends_before_all_are_lost() -> None:
    engines = FixedEngines([FailingEngine(f"http://{n}", EngineFaultError("bang")) for n in range(5)])
    with pytest.raises(EngineError, match=r"failed on 2 engines, one after the other .*bang"):
        run(engines, 1, max_retries=1)
    assert len(engines.reasons) == 2


def test_when_none_is_left_the_last_reason_is_given() -> None:
    with pytest.raises(EngineError, match=r"no engine is left: .*it died"):
        run(FixedEngines([FailingEngine("http://a", EngineFaultError("it died"))]), 3)


def test_what_is_not_needed_ends() -> None:
    engine = FakeEngine()
    found, _ = run(FixedEngines([engine]), 50, enough=lambda done: done >= 5)
    assert 5 <= len(found) < 10
    assert engine.in_flight == 0
    assert engine.aborts == 0, "others' requests go on"


def test_a_rollout_waits_for_weights_and_goes_on_with_what_it_has() -> None:
    engine = FailingEngine("http://a", EngineFaultError("it died"), good=5)
    engines = ReturningEngines([engine])
    prompts = CountingPrompts()
    config = make_config(Path("unused"), Path("unused"), prompts_per_step=8, concurrency=2).rollout
    rollouts = EngineRollouts(config, engines, prompts, FakeJudge(), prompts_per_update=1)
    with pytest.raises(EnginesNeedWeights):
        rollouts.next(1, 0)
    assert engines.looks <= 0, "while it started there was nothing to do but wait"
    engine.good = 1000
    engines.given()
    rollout = rollouts.next(1, 0)
    assert [group.prompt.row for group in rollout.groups] == list(range(8))
    assert prompts.taken == 8
    assert engine.finished == 8, "finished groups are not generated again"
    assert rollout.counts["moved_requests"] >= 1


def test_over_sampling_begins_more_and_takes_the_aborted_first_next_time() -> None:
    class Stuck(FakeEngine):
        """Never answers prompts 1 and 2 the first time."""

        stuck = frozenset({1, 2})

        async def generate(self, prompt_ids: list[int], *args: Any) -> list[Response]:
            if prompt_ids[0] in self.stuck:
                await asyncio.sleep(3600)
            return await super().generate(prompt_ids, *args)

    engine, prompts = Stuck(), CountingPrompts()
    config = make_config(
        Path("unused"), Path("unused"), prompts_per_step=4, dynamic_sampling=True, oversample=1.5
    ).rollout
    rollouts = EngineRollouts(config, FixedEngines([engine]), prompts, FakeJudge({0}), prompts_per_update=1)
    first = rollouts.next(1, 0)
    assert [group.prompt.row for group in first.groups] == [6, 3, 4, 5]  # 6 took the place of 0
    assert first.counts["aborted_groups"] == 2
    assert first.counts["dropped_groups"] == 1
    engine.stuck = frozenset()
    second = rollouts.next(2, 0)
    begun = {group.prompt.row for group in second.groups}
    assert prompts.taken == 7 + 4, "six places, two of them the aborted ones'"
    assert begun <= {1, 2, 7, 8, 9, 10}
    assert len(begun) == 4


def test_the_longest_come_first() -> None:
    lengths = ResponseLengths()
    config = make_config(Path("unused"), Path("unused"), prompts_per_step=3).rollout
    rollouts = EngineRollouts(
        config, FixedEngines([FakeEngine()]), CountingPrompts(), FakeJudge(), prompts_per_update=1
    )
    groups = rollouts.next(1, 0).groups
    for group, length in zip(groups, (5, 9, 2), strict=True):
        group.responses[:] = [Response([1] * length, [0.0] * length, "", "stop", [0] * length)]
        lengths.add(group)
    rows = [0, 1, 77, 2]
    assert lengths.longest_first([Prompt(row, [row], "", "", "") for row in rows]) == [2, 1, 0, 3]


def test_a_disconnect_reaches_the_server() -> None:
    """Over HTTP: what is not needed any more is cut off there, and nothing else is."""

    async def work() -> None:
        under_way: set[int] = set()
        arrived = asyncio.Event()

        async def handler(request: web.Request) -> web.Response:
            [row] = (await request.json())["input_ids"]
            under_way.add(row)
            if len(under_way) == 2:
                arrived.set()
            try:
                await asyncio.sleep(3600)
            finally:
                under_way.discard(row)
            raise AssertionError

        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        engines = FixedEngines([Engine(f"http://{host}:{port}")])
        config = make_config(Path("unused"), Path("unused")).rollout
        async with Dispatcher(engines, config, concurrency=8) as dispatcher:
            calls = [asyncio.create_task(dispatcher.generate([row], SAMPLING, 2, None, Counter())) for row in range(2)]
            await asyncio.wait_for(arrived.wait(), 30)
            calls[0].cancel()
            await asyncio.gather(calls[0], return_exceptions=True)
            while len(under_way) == 2:
                await asyncio.sleep(0.01)
            left = set(under_way)
            calls[1].cancel()
            await asyncio.gather(calls[1], return_exceptions=True)
        await runner.cleanup()
        assert left == {1}

    asyncio.run(work())


def test_what_is_in_flight_is_counted_in_responses() -> None:
    """An evaluation has benchmarks with 4 and with 32 samples."""

    class Counting(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.asked_for: list[int] = []
            self.most: list[int] = []

        async def generate(self, prompt_ids: list[int], sampling: SamplingConfig, n: int, *args: Any) -> list[Response]:
            self.asked_for.append(n)
            self.most.append(sum(self.asked_for))
            try:
                return await super().generate(prompt_ids, sampling, n, *args)
            finally:
                self.asked_for.remove(n)

    engine = Counting()

    async def work() -> None:
        config = make_config(Path("unused"), Path("unused")).rollout
        dispatcher = Dispatcher(FixedEngines([engine]), config, concurrency=8)
        sizes = [8, *[2] * 12]
        await dispatcher.all(
            [dispatcher.generate([6], SAMPLING, size, None, Counter()) for size in sizes]  # all take the same time
        )

    asyncio.run(work())
    assert max(engine.most) == 8
    assert max(engine.most[1:]) == 8, "where one of 8 has ended, four of 2 have room"
