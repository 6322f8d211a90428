"""What rewards consist of: scopes of math_verify, hostile answers, functions of every kind, and sums of several."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_gppo.config import ExtraRewardConfig, OverlongConfig, RewardConfig
from megatron_gppo.datatypes import Prompt, Response, Verdict
from megatron_gppo.rollout.answers import after_think, is_well_formed, nesting_depth
from megatron_gppo.rollout.rewards import OverlongPenalty, Rewards

USER_MODULE = """
import asyncio, os, time

CALLS = []

def batch_lengths(responses, ground_truths, data_sources):
    assert len(responses) == len(ground_truths) == len(data_sources)
    for response in responses:
        if response == "hang":
            time.sleep(1000)
        if response == "exit":
            os._exit(3)
        if response == "raise":
            raise ValueError("one of them")
    if "short" in responses:
        return []
    return [float(len(response)) for response in responses]

async def async_batch(responses, ground_truths, data_sources):
    await asyncio.sleep(0.001)
    return [response == truth for response, truth in zip(responses, ground_truths)]

async def answer_later(response, ground_truth, data_source):
    if response == "hang":
        await asyncio.sleep(1000)
    if response == "block":
        time.sleep(1000)
    if response == "raise":
        raise ValueError
    if response == "time out by itself":
        raise TimeoutError
    # Nobody is done before all have begun.
    CALLS.append(response)
    while len(CALLS) % 4:
        await asyncio.sleep(0.001)
    return True

def allocate(response, ground_truth, data_source):
    return len(bytearray(int(response) << 20)) > 0

def length(response, ground_truth, data_source):
    return len(response)

def is_long(response, ground_truth, data_source):
    return len(response) > 12

def broken(response, ground_truth, data_source):
    raise KeyError
"""


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def response(text: str, num_tokens: int = 1) -> Response:
    return Response([1] * num_tokens, [0.0] * num_tokens, text, "stop", [0] * num_tokens)


def judge(rewards: Any, texts: list[str], ground_truth: str = "12") -> list[Verdict]:
    prompt = Prompt(0, [1], "?", ground_truth, "test")
    return asyncio.run(rewards.judge(prompt, [response(text) for text in texts]))


def judged(texts: list[str], ground_truth: str = "12", **config: Any) -> list[Verdict]:
    rewards = Rewards(RewardConfig(**{"workers": 1, "timeout_s": 60.0, **config}))
    try:
        return judge(rewards, texts, ground_truth)
    finally:
        rewards.close()


@pytest.mark.parametrize(
    ("text", "rest"), [("a</think>b", "b"), ("a</think>b</think>c", "c"), ("<think>a", "<think>a"), ("</think>", "")]
)
def test_after_think(text: str, rest: str) -> None:
    assert after_think(text) == rest


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>hm</think>so \\boxed{1}", True),
        ("hm</think>so \\boxed{1}", True),
        ("so \\boxed{1}", True),
        ("<think>\\boxed{1}</think>so 1", False),
        ("a</think>b</think>\\boxed{1}", False),
        ("so \\boxed{1", False),
    ],
)
def test_format(text: str, well_formed: bool) -> None:
    assert is_well_formed(text) == well_formed


def test_nesting_depth() -> None:
    assert [nesting_depth(text) for text in ("", "1", "{[(1)]}", "{}{}", "}}}{{", "(" * 1000)] == [0, 0, 3, 1, 0, 1000]


def test_scopes() -> None:
    texts = [
        "so $x = 12$",  # no box
        "\\boxed{12} </think> so \\boxed{13}",
        "\\boxed{13} </think> so \\boxed{12}",
        "\\boxed{12} </think> it follows",  # the box is a thought
        "it may be 12 or",  # cut off
        "\\boxed{7}, no, the final answer is $12$. I hope it is correct.",
    ]
    correct = {
        ("last_boxed", True): [False, False, True, False, False, False],
        ("last_boxed", False): [False, False, True, True, False, False],
        ("response", True): [True, False, True, False, True, True],
        ("response", False): [True, False, True, True, True, True],
    }
    for (scope, think), expected in correct.items():
        assert [verdict.correct for verdict in judged(texts, scope=scope, after_think=think)] == expected, (
            scope,
            think,
        )
    (boxed,) = judged(["\\boxed{ 6+6. }"], correct=1.0, incorrect=-1.0)
    assert (boxed.reward, boxed.answer) == (1.0, "6+6")
    assert judged(["so 11"], incorrect=-1.0) == [Verdict(-1.0, False, "unparsable")]


# Each alone hangs or swells math-verify, or tries to make it do what it should not.
HOSTILE = {
    "tower": "\\boxed{9^{9^{9}}}",
    "large power": "\\boxed{3^{100000000}}",
    "factorials": "\\boxed{((100!)!)!}",
    "modulus of a tower": "\\boxed{9^{9^{9}} \\mod 7}",
    "nested fractions": "\\boxed{" + "\\frac{1}{1+" * 200 + "x" + "}" * 200 + "}",
    "nested braces": "\\boxed{" + "{" * 1000 + "1" + "}" * 1000 + "}",
    "nested brackets": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "a megabyte": "\\boxed{" + "1+" * 500_000 + "1}",
    "a megabyte of open boxes": "\\boxed{" * 140_000,
    "a megabyte of closing braces": "\\boxed{1" + "}" * 1_000_000,
    "input": "\\boxed{\\input{/etc/passwd}}",
    "write": "\\boxed{\\immediate\\write18{touch PWNED}}",
    "call": "\\boxed{__import__('os').system('touch PWNED')}",
    "call in text": "\\boxed{\\text{__import__('os').system('touch PWNED')}}",
    "lambda": "\\boxed{(lambda: exec(\"open('PWNED','w')\"))()}",
    "not UTF-8": "\\boxed{12\udcff\ud800}",
    "null": "\\boxed{\x00}",
    "control characters": "\\boxed{\x1b[31m1\u202e2}",
}


@pytest.mark.parametrize("scope", ["last_boxed", "response"])
def test_hostile_answers_do_no_harm(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    boxed = scope == "last_boxed"
    rewards = Rewards(RewardConfig(workers=1, timeout_s=30.0 if boxed else 3.0, scope=scope))  # type: ignore[arg-type]
    try:
        workers = reward_workers()
        # Where the whole response is judged, its text may also hold the answer without a box.
        texts = [*HOSTILE.values(), *([] if boxed else [text.removeprefix("\\boxed") for text in HOSTILE.values()])]
        verdicts = judge(rewards, texts)
        assert [verdict.correct for verdict in verdicts] == [False] * len(texts)
        assert judge(rewards, ["\\boxed{12}"])[0].correct
        assert not list(tmp_path.glob("PWNED"))
        assert all(worker.memory_info().rss < 400 << 20 for worker in reward_workers())
        if boxed:
            assert "timeout" not in {verdict.outcome for verdict in verdicts}
            assert reward_workers() == workers, "a worker was lost"
    finally:
        rewards.close()


def test_an_answer_that_hangs_all_the_same_costs_its_time_limit_and_not_more() -> None:
    product, binomial = "\\boxed{\\prod_{k=1}^{1000000000} k}", "\\boxed{\\binom{10000000}{5000000}}"
    started = time.monotonic()
    verdicts = judged([product, "\\boxed{12}", binomial, "\\boxed{13}"], timeout_s=3.0, workers=2)
    assert [verdict.outcome for verdict in verdicts] == ["timeout", "scored", "timeout", "scored"]
    assert [verdict.correct for verdict in verdicts] == [False, True, False, False]
    assert time.monotonic() - started < 60


def test_large_numbers_that_are_answers_are_still_judged() -> None:
    cases = [
        ("2^{2024}", "4^{1012}"),
        ("100!", "100\\cdot 99!"),
        ("10^{100}", "10^{50}\\cdot 10^{50}"),
        ("9^{9^{9}}", "9^{9^{9}}"),  # the same text
    ]
    rewards = Rewards(RewardConfig(workers=1, timeout_s=60.0))
    try:
        for truth, answer in cases:
            assert judge(rewards, [f"\\boxed{{{answer}}}"], truth)[0].correct, truth
    finally:
        rewards.close()


def test_more_memory_than_allowed_is_a_crash() -> None:
    rewards = Rewards(RewardConfig(function="more_rewards:allocate", workers=1, memory_mb=512))
    try:
        outcomes = [verdict.outcome for verdict in judge(rewards, ["10", "4000", "10", "400000", "10"])]
        assert outcomes == ["scored", "crash", "scored", "crash", "scored"]
    finally:
        rewards.close()
    assert judged(["1000"], function="more_rewards:allocate", memory_mb=None)[0].outcome == "scored"


def test_ground_truths_that_cannot_be_read() -> None:
    truths = ["12", "\\frac{1}{2}", "\\sqrt{2}+", "\\boxed{3}", "9^{9^{9}}", "12", "\\sqrt{2}+", "1" * 5000]
    prompts = [Prompt(row, [1], "?", truth, "test") for row, truth in enumerate(truths)]
    rewards = Rewards(RewardConfig(workers=2, timeout_s=60.0))
    try:
        assert rewards.unparsable_ground_truths(prompts) == [2, 4, 6, 7]
    finally:
        rewards.close()
    users = Rewards(RewardConfig(function="more_rewards:length", workers=1))
    try:
        assert users.unparsable_ground_truths(prompts) == []
    finally:
        users.close()


@pytest.fixture
def batched() -> Iterator[Rewards]:
    rewards = Rewards(RewardConfig(function="more_rewards:batch_lengths", batched=True, workers=1, timeout_s=1.0))
    yield rewards
    rewards.close()


@pytest.mark.parametrize("culprit", ["hang", "exit", "raise"])
def test_a_batch_that_fails_costs_only_the_one_to_blame(batched: Rewards, culprit: str) -> None:
    texts = ["a", "bb", culprit, "ccc", "dddd"]
    verdicts = judge(batched, texts)
    assert [verdict.outcome == "scored" for verdict in verdicts] == [text != culprit for text in texts]
    assert verdicts[2].outcome == ("timeout" if culprit == "hang" else "crash")
    assert [verdict.reward for verdict in verdicts] == [1.0, 2.0, 0.0, 3.0, 4.0]


def test_batched_functions(batched: Rewards) -> None:
    lengths = [(7 * index) % 50 for index in range(100)]
    assert [verdict.reward for verdict in judge(batched, ["x" * length for length in lengths])] == lengths
    assert [verdict.outcome for verdict in judge(batched, ["short", "short"])] == ["crash"] * 2
    config = {"function": "more_rewards:async_batch", "batched": True}
    assert [verdict.correct for verdict in judged(["12", "13"] * 20, **config)] == [True, False] * 20


def test_async_functions_run_at_once_and_fail_alone() -> None:
    rewards = Rewards(RewardConfig(function="more_rewards:answer_later", workers=1, timeout_s=2.0, batch_size=4))
    try:

        async def together() -> list[list[Verdict]]:
            # The first occupies the worker until the others are there.
            prompt = Prompt(0, [1], "?", "12", "test")
            first = asyncio.create_task(rewards.judge(prompt, [response("hang")]))
            await asyncio.sleep(0.2)
            return await asyncio.gather(first, rewards.judge(prompt, [response("x")] * 8))

        first, others = asyncio.run(together())
        assert [verdict.outcome for verdict in first] == ["timeout"]
        assert [verdict.outcome for verdict in others] == ["scored"] * 8
        (worker,) = reward_workers()
        failing = [judge(rewards, [text])[0].outcome for text in ("raise", "time out by itself")]
        assert failing == ["crash", "crash"]
        assert reward_workers() == [worker], "what is awaited is given up without killing"
        assert [judge(rewards, [text])[0].outcome for text in ("block", "raise")] == ["timeout", "crash"]
        assert reward_workers() != [worker]
    finally:
        rewards.close()


def test_a_sum_of_several_rewards() -> None:
    config = RewardConfig(
        workers=1,
        correct=1.0,
        incorrect=-1.0,
        format_weight=0.5,
        timeout_s=60.0,
        extra={
            "length": ExtraRewardConfig(function="more_rewards:length", weight=-0.1, workers=1),
            "long": ExtraRewardConfig(function="more_rewards:is_long", weight=2.0, workers=1),
        },
    )
    rewards = Rewards(config)
    try:
        verdicts = judge(rewards, ["\\boxed{12}", "so: \\boxed{13}", "12"])
    finally:
        rewards.close()
    parts = [
        {"answer": 1.0, "format": 0.5, "length": -1.0, "long": 0.0},
        {"answer": -1.0, "format": 0.5, "length": pytest.approx(-1.4), "long": 2.0},
        {"answer": -1.0, "format": 0.0, "length": -0.2, "long": 0.0},
    ]
    assert [verdict.parts for verdict in verdicts] == parts
    assert [verdict.reward for verdict in verdicts] == [sum(verdict.parts.values()) for verdict in verdicts]
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert [verdict.outcome for verdict in verdicts] == ["scored", "scored", "unparsable"]


def test_an_extra_reward_that_fails_adds_nothing_and_is_counted() -> None:
    extra = {"broken": ExtraRewardConfig(function="more_rewards:broken", workers=1)}
    assert judged(["\\boxed{12}"], extra=extra) == [Verdict(1.0, True, "crash", "12", {"answer": 1.0, "broken": 0.0})]


def test_an_extra_reward_that_cannot_start_ends_the_others() -> None:
    with pytest.raises(ValueError, match=r"reward.extra.mine.function = nowhere:judge: importing nowhere failed"):
        Rewards(RewardConfig(workers=1, extra={"mine": ExtraRewardConfig(function="nowhere:judge")}))
    assert reward_workers() == []


def test_overlong_penalty() -> None:
    """DAPO, Eq. 13, with L_max = 100 and L_cache = 20."""

    class Fixed:
        async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
            return [Verdict(1.0, True, "scored")] * len(responses)

    penalty = OverlongPenalty(Fixed(), OverlongConfig(buffer_tokens=20, penalty=0.5), max_response_tokens=100)
    prompt = Prompt(0, [1], "?", "12", "test")
    verdicts = asyncio.run(penalty.judge(prompt, [response("", length) for length in (1, 80, 85, 90, 100)]))
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.875, 0.75, 0.5]
    assert verdicts[2].parts == {"answer": 1.0, "overlong": -0.125}
    assert all(verdict.correct for verdict in verdicts)


def reward_workers() -> list[psutil.Process]:
    children = psutil.Process(os.getpid()).children()
    return [child for child in children if "reward_worker" in " ".join(child.cmdline())]
