"""Advantages: Eq. 2, its properties, and the samples made with it."""

import math
import statistics
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.algorithm import group_advantages, is_degenerate, samples_from_groups
from megatron_gppo.config import Advantage
from megatron_gppo.datatypes import Group, Prompt, Response, Verdict

KINDS = get_args(Advantage)
rewards_lists = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=16)


def make_group(rewards: list[float], truncated: tuple[int, ...] = (), row: int = 0) -> Group:
    """Responses of 1, 2, 3, ... tokens."""
    responses = [
        Response(
            token_ids=list(range(10, 11 + index)),
            logprobs=[-0.5] * (index + 1),
            text="",
            finish_reason="length" if index in truncated else "stop",
            policy_versions=[],
        )
        for index in range(len(rewards))
    ]
    verdicts = [Verdict(reward=reward, correct=reward > 0.5, outcome="scored") for reward in rewards]
    return Group(Prompt(row, [5, 14, 6], "2+3=", "5", "sums"), responses, verdicts)


@settings(deadline=None)
@given(rewards_lists)
def test_equation_2(rewards: list[float]) -> None:
    advantages = group_advantages(rewards)
    if len(set(rewards)) == 1:
        assert advantages == [0.0] * len(rewards)
        return
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)  # stdev divides by G - 1
    assert advantages == pytest.approx([(reward - mean) / (std + 1e-6) for reward in rewards], rel=1e-7, abs=1e-7)


@settings(deadline=None)
@given(rewards_lists)
def test_without_std_and_leave_one_out(rewards: list[float]) -> None:
    mean = statistics.mean(rewards)
    assert group_advantages(rewards, "mean") == pytest.approx([reward - mean for reward in rewards], abs=1e-9)
    others = [statistics.mean(rewards[:index] + rewards[index + 1 :]) for index in range(len(rewards))]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(rewards_lists, st.floats(-50, 50), st.floats(0.1, 10))
def test_shifting_and_scaling_rewards(rewards: list[float], shift: float, scale: float) -> None:
    """A shift changes nothing; a scale goes through, except that the standard deviation takes it out."""
    moved = [scale * reward + shift for reward in rewards]
    for kind in ("mean", "leave_one_out"):
        expected = [scale * advantage for advantage in group_advantages(rewards, kind)]
        assert group_advantages(moved, kind) == pytest.approx(expected, abs=1e-7)
    if max(rewards) - min(rewards) > 0.1:  # the floor of 1e-6 is small beside their deviation
        assert group_advantages(moved) == pytest.approx(group_advantages(rewards), rel=1e-3)


@settings(deadline=None)
@given(rewards_lists, st.randoms(), st.sampled_from(KINDS))
def test_only_the_order_within_the_group_matters_to_the_order(rewards: list[float], random, kind: Advantage) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    advantages = group_advantages(rewards, kind)
    shuffled = group_advantages([rewards[index] for index in order], kind)
    assert shuffled == pytest.approx([advantages[index] for index in order], abs=1e-7)
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-7)
    for low, high in zip(np.argsort(rewards)[:-1], np.argsort(rewards)[1:], strict=True):
        assert advantages[low] <= advantages[high]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.1, -1.0, 1e30])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_equal_rewards_give_exactly_zero(reward: float, size: int, kind: Advantage) -> None:
    """The mean of three times 0.1 is not 0.1 in floating point."""
    assert group_advantages([reward] * size, kind) == [0.0] * size
    assert is_degenerate(make_group([reward] * size))


def test_is_degenerate_is_false_for_any_difference() -> None:
    assert not is_degenerate(make_group([1.0, 1.0, 1.0 + 1e-9]))


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_reward_that_is_not_finite_names_the_row(reward: float) -> None:
    with pytest.raises(ValueError, match="prompt row 7: rewards"):
        samples_from_groups([make_group([1.0, reward], row=7)])


def test_samples_keep_order_groups_and_tokens() -> None:
    groups = [make_group([1.0, 0.0]), make_group([1.0, 1.0, 1.0])]
    samples = samples_from_groups(groups)
    assert [sample.group for sample in samples] == [0, 0, 1, 1, 1]
    assert [sample.correct for sample in samples] == [True, False, True, True, True]
    assert [sample.advantage for sample in samples] == [*group_advantages([1.0, 0.0]), 0.0, 0.0, 0.0]
    centered = samples_from_groups(groups, advantage="mean")
    assert [sample.advantage for sample in centered] == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert [len(sample.response_ids) for sample in samples] == [1, 2, 1, 2, 3]
    last = samples[-1]
    assert (last.prompt_ids.tolist(), last.response_ids.tolist()) == ([5, 14, 6], [10, 11, 12])
    assert last.rollout_logprobs.tolist() == [-0.5] * 3
    assert (last.prompt_ids.dtype, last.response_ids.dtype, last.rollout_logprobs.dtype) == (
        np.int64,
        np.int64,
        np.float32,
    )


def test_masking_truncated_responses_leaves_advantages_alone() -> None:
    group = make_group([1.0, 0.0, 0.0], truncated=(1,))
    kept, masked = samples_from_groups([group]), samples_from_groups([group], mask_truncated=True)
    assert [sample.masked for sample in kept] == [False, False, False]
    assert [sample.masked for sample in masked] == [False, True, False]
    assert [sample.advantage for sample in kept] == [sample.advantage for sample in masked]


def test_mismatched_group_names_the_row() -> None:
    group = make_group([1.0, 0.0], row=3)
    with pytest.raises(ValueError, match="prompt row 3: 2 responses but 1 verdicts"):
        samples_from_groups([Group(group.prompt, group.responses, group.verdicts[:1])])
    group.responses[1].logprobs.pop()
    with pytest.raises(ValueError, match="prompt row 3: a response has 2 tokens but 1 log-probs"):
        samples_from_groups([group])
