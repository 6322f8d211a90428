"""Rollouts ahead of the loop: how far, from which prompts, and what becomes of failures and cancellations."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gppo.config import Config
from megatron_gppo.data import PromptStream
from megatron_gppo.datatypes import Prompt, Response, Rollout, Verdict
from megatron_gppo.rollout.ahead import AheadRollouts
from megatron_gppo.rollout.dispatch import EnginesNeedWeights
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.generate import EngineRollouts, RolloutCancelled, RolloutError
from megatron_gppo.rollout.pieces import Staleness
from tests.support.fake_engine import FakeEngine, FakeJudge, FixedEngines
from tests.support.rollout import make_config

PROMPTS = [Prompt(row, [row], f"{row}", f"{row}", "s") for row in range(50)]
LAST_STEP = 6


class Gated:
    """A source whose rollouts are made when open() lets them."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.fails: dict[int, Exception] = {}
        self._open = threading.Semaphore(0)
        self._cancelled = False

    def open(self, count: int = 1) -> None:
        self._open.release(count)

    def next(self, step: int, policy_version: int) -> Rollout:
        self.begun.append(step)
        while not self._open.acquire(timeout=0.01):
            if self._cancelled:
                raise RolloutCancelled
        if (failure := self.fails.pop(step, None)) is not None:
            raise failure
        return Rollout([], {"step": step}, {})

    def cancel(self) -> None:
        self._cancelled = True


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def stays(condition: Callable[[], bool]) -> bool:
    """Over a moment in which a thread that could go on would."""
    deadline = time.monotonic() + 0.1
    while condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("first", [1, 4])
def test_no_step_begins_before_its_weights_are_there(staleness: int, first: int) -> None:
    """However fast generation is: the loop at step k holds weights k - 1, which steps up to k + staleness may use."""
    source = Gated()
    source.open(100)
    ahead = AheadRollouts(source, staleness=staleness, last_step=LAST_STEP)
    assert source.begun == []
    for step in range(first, LAST_STEP + 1):
        assert ahead.next(step, step - 1).counts == {"step": step}
        expected = list(range(first, min(step + staleness, LAST_STEP) + 1))
        assert eventually(lambda expected=expected: source.begun == expected)
        assert stays(lambda expected=expected: source.begun == expected)
    ahead.close()


def test_the_loop_waits_for_its_step_and_no_other() -> None:
    source = Gated()
    ahead = AheadRollouts(source, staleness=1, last_step=LAST_STEP)
    got: list[Rollout] = []
    loop = threading.Thread(target=lambda: got.append(ahead.next(1, 0)))
    loop.start()
    assert stays(lambda: not got)
    source.open()
    loop.join(30)
    assert [rollout.counts["step"] for rollout in got] == [1]
    assert eventually(lambda: source.begun == [1, 2])
    source.open()
    assert ahead.next(2, 1).counts == {"step": 2}
    ahead.close()


def test_a_failure_reaches_the_loop_at_its_step_and_can_be_tried_again() -> None:
    source = Gated()
    source.open(100)
    source.fails[3] = RolloutError("no group")
    ahead = AheadRollouts(source, staleness=2, last_step=LAST_STEP)
    for step in (1, 2):
        assert ahead.next(step, step - 1).counts == {"step": step}
    with pytest.raises(RolloutError, match="no group"):
        ahead.next(3, 2)
    assert ahead.next(3, 2).counts == {"step": 3}
    assert source.begun.count(3) == 2
    ahead.close()


def test_what_waited_for_weights_goes_on_after_the_sync() -> None:
    """Step 2 finds no engine while step 1 trains; the sync after that gives the restarted one its weights."""
    source = Gated()
    source.open(100)
    source.fails[2] = EnginesNeedWeights()
    ahead = AheadRollouts(source, staleness=1, last_step=LAST_STEP)
    ahead.next(1, 0)
    assert eventually(lambda: source.begun == [1, 2])
    assert stays(lambda: source.begun == [1, 2])
    assert ahead.next(2, 1).counts == {"step": 2}
    source.fails[4] = EnginesNeedWeights()
    assert ahead.next(3, 2).counts == {"step": 3}
    assert eventually(lambda: source.begun == [1, 2, 2, 3, 4])
    source.fails[4] = EnginesNeedWeights()  # the loop has to help
    with pytest.raises(EnginesNeedWeights):
        ahead.next(4, 3)
    assert ahead.next(4, 3).counts == {"step": 4}
    ahead.close()


def test_while_paused_nothing_is_generated() -> None:
    source = Gated()
    ahead = AheadRollouts(source, staleness=2, last_step=LAST_STEP)
    source.open()
    ahead.next(1, 0)
    assert eventually(lambda: source.begun == [1, 2])
    entered, leave = threading.Event(), threading.Event()

    def evaluate() -> None:
        with ahead.paused():
            entered.set()
            leave.wait(30)

    evaluation = threading.Thread(target=evaluate)
    evaluation.start()
    assert stays(lambda: not entered.is_set()), "step 2 is being generated"
    source.open(100)
    assert entered.wait(30)
    assert stays(lambda: source.begun == [1, 2])
    leave.set()
    assert eventually(lambda: source.begun == [1, 2, 3])
    evaluation.join(30)
    ahead.close()


def test_cancel_ends_whoever_waits() -> None:
    source = Gated()
    ahead = AheadRollouts(source, staleness=1, last_step=LAST_STEP)
    threading.Timer(0.1, ahead.cancel).start()
    with pytest.raises(RolloutCancelled):
        ahead.next(1, 0)
    with pytest.raises(RolloutCancelled):
        ahead.next(1, 0)
    with ahead.paused():
        pass
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_close_without_a_step() -> None:
    AheadRollouts(Gated(), staleness=1, last_step=LAST_STEP).close()


class Forever:
    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
        await asyncio.sleep(3600)
        raise AssertionError


def make_source(
    config: Config, engine: FakeEngine, prompts: PromptStream, judge: Any, staleness: int
) -> EngineRollouts:
    return EngineRollouts(
        config.rollout,
        FixedEngines([engine]),
        prompts,
        judge,
        prompts_per_update=1,
        staleness=Staleness(staleness, str) if staleness else None,
    )


def make_ahead(
    engine: FakeEngine, position: int = 0, staleness: int = 1, judge: Any = None
) -> tuple[AheadRollouts, PromptStream]:
    config = make_config(Path("unused"), Path("unused"), dynamic_sampling=True, max_refills=8)
    prompts = PromptStream(PROMPTS, shuffle=True, seed=3, position=position)
    judge = judge or FakeJudge({row for row in range(50) if row % 3 == 0})
    source = make_source(config, engine, prompts, judge, staleness)
    return AheadRollouts(source, staleness=staleness, last_step=LAST_STEP), prompts


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_resumed_run_loses_and_repeats_no_prompt(staleness: int, done: int) -> None:
    """The position saved is that of the prompts of steps that were trained, refills of dropped groups included."""

    def train(first: int, last: int, position: int) -> tuple[list[list[int]], int]:
        engine = FakeEngine(version=first - 1)
        ahead, prompts = make_ahead(engine, position, staleness)
        rows = []
        for step in range(first, last + 1):
            rollout = ahead.next(step, step - 1)
            rows.append([group.prompt.row for group in rollout.groups])
            position = rollout.data_position
            if step < LAST_STEP:
                assert eventually(lambda position=position: prompts.position > position), "the next step is ahead"
            engine.version = step
        ahead.close()
        return rows, position

    uninterrupted, end = train(1, LAST_STEP, 0)
    before, position = train(1, done, 0)
    after, resumed_end = train(done + 1, LAST_STEP, position)
    assert before + after == uninterrupted
    assert resumed_end == end


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_tokens_older_than_the_bound_are_an_error(staleness: int) -> None:
    """At every age, whatever made it: a server that missed a sync must not reach a batch."""
    for age in range(4):
        engine = FakeEngine(version=10 - age)
        config = make_config(Path("unused"), Path("unused"))
        source = make_source(config, engine, PromptStream(PROMPTS, shuffle=False, seed=0), FakeJudge(), staleness)
        if age <= staleness:
            assert len(source.next(11, 10).groups) == 4
        else:
            with pytest.raises(
                EngineError, match=f"no engine is left.*weights of version {10 - age}, the policy has version 10"
            ):
                source.next(11, 10)


def test_one_old_token_is_enough() -> None:
    class Mixed(FakeEngine):
        async def generate(self, *arguments: Any, **options: Any) -> list[Response]:
            return [
                Response(one.token_ids, one.logprobs, one.text, one.finish_reason, [7, 8, 9])
                for one in await super().generate(*arguments, **options)
            ]

    for staleness, newest, fine in ((2, 9, True), (1, 9, False), (2, 8, False), (2, 10, False)):
        config = make_config(Path("unused"), Path("unused"))
        source = make_source(config, Mixed(), PromptStream(PROMPTS, shuffle=False, seed=0), FakeJudge(), staleness)
        if fine:
            source.next(newest + 1, newest)
        else:
            with pytest.raises(EngineError, match=r"no engine is left.*generated by weights of version"):
                source.next(newest + 1, newest)


def run_until_cancelled(ahead: AheadRollouts, last: int) -> None:
    with contextlib.suppress(RolloutCancelled):
        for step in range(1, last + 1):
            ahead.next(step, step - 1)


def test_closing_ends_what_the_engines_are_working_on() -> None:
    engine = FakeEngine()
    ahead, _ = make_ahead(engine, judge=Forever())
    loop = threading.Thread(target=run_until_cancelled, args=(ahead, 1))
    loop.start()
    assert eventually(lambda: engine.finished == 4)
    ahead.close()
    loop.join(30)
    assert not loop.is_alive()
    assert engine.aborts == 1


def test_cancelling_at_any_moment_ends_in_time() -> None:
    """The loop's thread, the one that generates, and its event loop, which may just be closing."""
    for seed in range(20):
        ahead, _ = make_ahead(FakeEngine(), staleness=2)
        threading.Timer(random.Random(seed).uniform(0, 0.05), ahead.cancel).start()
        with contextlib.suppress(EngineError):  # these weights never get newer
            run_until_cancelled(ahead, LAST_STEP)
        ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]
