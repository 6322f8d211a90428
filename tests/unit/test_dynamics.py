"""The views of entropy dynamics, against token-by-token recomputation in fp64 and autograd's gradient."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gppo.algorithm import LOG_RATIO_BOUNDS, QUADRANTS, policy_loss
from megatron_gppo.datatypes import EntropyPoint, UpdateStats
from megatron_gppo.entropy_trace import STEPS, covariance, extended, trace_scalars
from tests.support.loss_reference import AGGREGATIONS, OBJECTIVES, Batch, loss_config, random_batch, single_sequence


def gradients(objective: str, batch: Batch, **settings: object) -> torch.Tensor:
    """d loss / d logprob, by autograd, of all tokens as packed."""
    config = loss_config(objective, **settings)
    inputs = batch.pack(config)
    inputs["logprobs"] = inputs["logprobs"].clone().requires_grad_()
    policy_loss(config, **inputs).loss.backward()
    return inputs["logprobs"].grad


@pytest.mark.parametrize("settings", [{}, {"dual_clip": 1.5, "importance_correction": "truncated"}])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_quadrants_add_up_to_the_gradient_of_the_loss(
    objective: str, aggregation: str, settings: dict[str, Any]
) -> None:
    batch = random_batch(seed=3, lengths=[7, 1, 0, 12, 5])
    config = loss_config(objective, aggregation=aggregation, high_probability=0.3, **settings)
    packed = batch.pack(config)
    metrics = {name: value.item() for name, value in policy_loss(config, **packed).metrics.items()}
    size = gradients(objective, batch, aggregation=aggregation, **settings).abs()
    mask, advantages = packed["loss_mask"], packed["advantages"]
    likely = packed["logprobs"].exp() >= 0.3
    assert metrics["gradient"] == pytest.approx(size[mask].sum().item(), rel=1e-5)
    for name, chosen in {
        "pa_hp": mask & (advantages > 0) & likely,
        "pa_lp": mask & (advantages > 0) & ~likely,
        "na_hp": mask & (advantages < 0) & likely,
        "na_lp": mask & (advantages < 0) & ~likely,
    }.items():
        assert metrics[f"tokens_{name}"] == chosen.sum()
        assert metrics[f"gradient_{name}"] == pytest.approx(size[chosen].sum().item(), rel=1e-5, abs=1e-9)
        assert metrics[f"probability_{name}"] == pytest.approx(packed["logprobs"][chosen].exp().sum().item(), rel=1e-5)


def test_bounds_act_on_the_tokens_that_they_are_meant_for() -> None:
    log_ratio = torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.0])
    advantages = torch.tensor([-2.0, 1.0, -1.0, 3.0, 1.0])
    config = loss_config(beta1=0.5, beta2=1.25)  # clip range 0.8 to 1.28
    inputs = single_sequence(log_ratio, advantages).pack(config)
    metrics = policy_loss(config, **inputs).metrics
    assert (metrics["tokens_left"], metrics["tokens_right"]) == (1, 1)
    assert metrics["gradient_left"].item() == pytest.approx(0.5 * 0.8 * 2.0 / inputs["denominator"])
    assert metrics["gradient_right"].item() == pytest.approx(1.25 * 1.28 * 3.0 / inputs["denominator"])
    clipped = inputs["logprobs"][[0, 3]].exp()
    assert metrics["probability_left"].item() == pytest.approx(clipped[0].item())
    assert metrics["probability_right"].item() == pytest.approx(clipped[1].item())


def test_cispo_bounds_the_weight_whatever_the_advantage() -> None:
    log_ratio = torch.tensor([-0.7, -0.7, 0.7, 0.7, 0.7, 0.0])
    advantages = torch.tensor([-2.0, 1.0, -1.0, 3.0, 0.0, 1.0])
    inputs = single_sequence(log_ratio, advantages).pack(config := loss_config("cispo"))
    metrics = policy_loss(config, **inputs).metrics
    assert (metrics["tokens_left"], metrics["tokens_right"]) == (2, 2)


def test_a_tokens_gradient_weight_is_that_in_its_update() -> None:
    """So that shares over a step's updates are of the gradient that the step takes, not of tokens."""
    config = loss_config()
    sums = []
    for length, advantage in ((10, 1.0), (90, -1.0)):
        batch = single_sequence(torch.zeros(length), torch.full((length,), advantage))
        sums.append(policy_loss(config, **batch.pack(config)).metrics["gradient"].item())
    assert sums == pytest.approx([1.0, 1.0])


def test_sums_of_all_tokens() -> None:
    batch = random_batch(seed=5, lengths=[9, 30, 0, 4])
    config = loss_config()
    packed = batch.pack(config)
    metrics = policy_loss(config, **packed).metrics
    mask = packed["loss_mask"]
    x, a = packed["logprobs"][mask].double(), packed["advantages"][mask].double()
    ratio = (x - packed["old_logprobs"][mask].double()).exp()
    expected = {
        "probability": x.exp().sum(),
        "logprob": x.sum(),
        "weighted_advantage": (x.exp() * a).sum(),
        "product": (x * x.exp() * a).sum(),
        "squared_ratio": ratio.square().sum(),
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    stats = make_stats({name: float(value) for name, value in metrics.items()}, int(mask.sum()))
    assert covariance([stats]) == pytest.approx(np.cov(x, x.exp() * a, ddof=0)[0, 1], rel=1e-4)


def test_histogram_has_every_loss_token_in_its_bucket() -> None:
    log_ratio = torch.tensor([-25.0, -1.0, -0.96, 0.0, 0.01, 0.999, 1.5, 25.0])
    config = loss_config()
    inputs = single_sequence(log_ratio, torch.ones(8)).pack(config)
    inputs["loss_mask"][3] = False
    counts = policy_loss(config, **inputs).ratio_histogram
    assert counts.sum() == 7
    assert len(counts) == len(LOG_RATIO_BOUNDS)
    buckets = {index: int(count) for index, count in enumerate(counts) if count}
    assert buckets == {0: 2, 1: 1, 21: 1, 40: 1, 41: 2}  # bounds -1, -0.95, ..., 0, 0.05, ..., 1, 20


def test_no_token_no_share() -> None:
    config = loss_config()
    inputs = single_sequence(torch.full((3,), math.nan), torch.full((3,), math.inf)).pack(config)
    inputs["loss_mask"][:] = False
    output = policy_loss(config, **(inputs | {"denominator": 1}))
    assert all(value == 0 for value in output.metrics.values())
    assert output.ratio_histogram.sum() == 0
    assert set(QUADRANTS) == {"pa_hp", "pa_lp", "na_hp", "na_lp"}


def make_stats(sums: dict[str, float], num_loss_tokens: int) -> UpdateStats:
    return UpdateStats(sums, {}, [], num_loss_tokens, loss=0.0, grad_norm=1.0, lr=1e-4, skipped=False)


def test_trace_keeps_the_last_steps_and_skips_empty_ones() -> None:
    stats = make_stats(
        {"logprob": -4.0, "weighted_advantage": 2.0, "product": -1.0, "num_tokens": 2, "entropy": 3.0}, 2
    )
    trace: tuple[EntropyPoint, ...] = ()
    for _ in range(STEPS + 5):
        trace = extended(trace, [stats])
    assert len(trace) == STEPS + 1
    assert trace[-1] == EntropyPoint(covariance=-0.5 + 2.0, entropy=1.5)
    assert extended(trace, [make_stats({}, 0)]) == trace


def test_trace_scalars() -> None:
    assert trace_scalars([]) == trace_scalars([EntropyPoint(1.0, 1.0)]) == {}
    # Changes +1, -2, +3, foretold with the right sign twice and once with the wrong one.
    trace = [EntropyPoint(-1.0, 5.0), EntropyPoint(2.0, 6.0), EntropyPoint(0.5, 4.0), EntropyPoint(9.0, 7.0)]
    scalars = trace_scalars(trace)
    assert scalars["entropy/sign_agreement"] == pytest.approx(2 / 3)
    assert scalars["entropy/covariance_correlation"] == pytest.approx(np.corrcoef([1.0, -2.0, -0.5], [1, -2, 3])[0, 1])
    still = [EntropyPoint(1.0, 2.0)] * 6
    assert "entropy/covariance_correlation" not in trace_scalars(still)
