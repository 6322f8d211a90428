"""policy_loss against the fp64 reference, in value and gradient, and the properties that its docstring states."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_gppo.algorithm import LossConfig, loss_denominator, policy_loss
from megatron_gppo.datatypes import UpdateBatch
from tests.support.loss_reference import (
    AGGREGATIONS,
    MAX_RESPONSE_TOKENS,
    OBJECTIVES,
    Batch,
    LossAndGradients,
    Reference,
    loss_config,
    one_token_sequences,
    random_batch,
    reference_loss,
    run_policy_loss,
    single_sequence,
)

UNDERFLOW = 1e-30  # products this small leave fp32's range, and are 0 beside anything else

EXTRAS = {
    "plain": {},
    "dual_clip": {"dual_clip": 1.5},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.01},
    "nll": {"nll_coef": 0.1},
    "truncated": {"importance_correction": "truncated", "importance_cap": 1.25},
    "masked": {"importance_correction": "masked", "importance_cap": 1.5},
    "truncated_sequence": {
        "importance_correction": "truncated",
        "importance_cap": 1.25,
        "importance_level": "sequence",
    },
    "masked_sequence": {"importance_correction": "masked", "importance_cap": 2.5, "importance_level": "sequence"},
    "truncated_geometric": {
        "importance_correction": "truncated",
        "importance_cap": 1.01,
        "importance_level": "geometric",
    },
    "masked_geometric": {"importance_correction": "masked", "importance_cap": 1.2, "importance_level": "geometric"},
    "all": {
        "dual_clip": 3.0,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "nll_coef": 0.1,
        "importance_correction": "truncated",
    },
}


def assert_matches_reference(config: LossConfig, batch: Batch) -> None:
    actual, expected = run_policy_loss(config, batch), reference_loss(config, batch)
    assert abs(actual.loss - expected.loss) <= 2e-6 * expected.magnitude + UNDERFLOW
    assert_gradients(actual, expected, list(range(len(batch.sequences))))


def assert_gradients(actual: LossAndGradients, expected: Reference, sequences: list[int]) -> None:
    """2e-6 relative; where the terms of a token (objective, KL, NLL) cancel, relative to their sizes."""
    for got, index in zip(actual.logprobs, sequences, strict=True):
        difference = (got.double() - expected.logprobs[index]).abs()
        assert (difference <= 2e-6 * expected.logprobs_scale[index] + UNDERFLOW).all(), (got, expected.logprobs[index])
    for got, index in zip(actual.entropy, sequences, strict=True):
        torch.testing.assert_close(got.double(), expected.entropy[index], rtol=2e-6, atol=UNDERFLOW)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_reference(objective: str, aggregation: str, extras: str) -> None:
    config = loss_config(objective, aggregation=aggregation, **EXTRAS[extras])
    # 1 is a one-token response, 0 a response without loss tokens; the last group has none at all.
    batch = random_batch(seed=1, lengths=[5, 1, 0, 9, 0, 0])
    assert_matches_reference(config, batch)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_adversarial_ratios(objective: str, dual_clip: float | None) -> None:
    inner = torch.tensor([0.0, -20.0, -19.99, -3.0, -1e-7, 1e-7, 3.0, 19.99, 20.0])
    bounds = torch.cat([_around_bound(0.8), _around_bound(1.28), _around_bound(10.0)])
    log_ratio = torch.cat([inner, bounds]).repeat(3)
    advantages = torch.tensor([1.7, -0.6, 0.0]).repeat_interleave(len(log_ratio) // 3)
    assert_matches_reference(loss_config(objective, dual_clip=dual_clip), single_sequence(log_ratio, advantages))


@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_adversarial_sequence_ratios(dual_clip: float | None) -> None:
    """gspo's ratio is the sequence's: one-token sequences put it exactly where it is wanted, at its narrow clip range."""
    config = loss_config("gspo", clip_low=3e-4, clip_high=4e-4, dual_clip=dual_clip)
    inner = torch.tensor([0.0, -20.0, -3.0, -1e-7, 1e-7, 3.0, 20.0])
    log_ratio = torch.cat([inner, *(_around_bound(bound) for bound in (1 - 3e-4, 1 + 4e-4, 10.0))]).repeat(3)
    advantages = torch.tensor([1.7, -0.6, 0.0]).repeat_interleave(len(log_ratio) // 3)
    assert_matches_reference(config, one_token_sequences(log_ratio, advantages))


def test_gspo_clamps_the_ratio_of_the_sequence_not_of_its_tokens() -> None:
    batch = single_sequence(torch.tensor([-59.9, 0.0, 0.0]), torch.ones(3))
    config = loss_config("gspo")
    assert_matches_reference(config, batch)
    assert policy_loss(config, **batch.pack(config)).metrics["clamped_log_ratio"] == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1])
def test_small_differences_to_the_reference_policy(estimator: str, size: float) -> None:
    """The terms of k3 cancel there."""
    batch = single_sequence(torch.zeros(8), torch.zeros(8))
    (sequence,) = batch.sequences
    sequence.ref_logprobs = sequence.logprobs + size * torch.linspace(-1, 1, len(sequence.logprobs))
    assert_matches_reference(loss_config(kl_coef=0.3, kl_estimator=estimator), batch)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_tokens_match_the_reference(data: st.DataObject) -> None:
    """Every objective, aggregation and option, on ratios up to e^20 either way and advantages of any size and sign."""
    objective = data.draw(st.sampled_from(OBJECTIVES))
    extras = EXTRAS[data.draw(st.sampled_from(sorted(EXTRAS)))]
    config = loss_config(objective, aggregation=data.draw(st.sampled_from(AGGREGATIONS)), **extras)
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    batch = random_batch(data.draw(st.integers(0, 2**31)), [*lengths, 1])
    for sequence in batch.sequences:
        keep, count = sequence.loss_mask, sequence.num_loss_tokens
        numbers = st.lists(st.floats(-20, 20, width=32), min_size=count, max_size=count)
        # The old log-prob is 0, so that the fp32 log-ratio is this number and not its rounding.
        sequence.old_logprobs[keep] = 0.0
        sequence.logprobs[keep] = torch.tensor(data.draw(numbers))
        sequence.rollout_logprobs[keep] = torch.tensor(data.draw(numbers))
        if objective != "gspo":  # its ratio is the sequence's, and its advantage is, too
            sequence.advantages = sequence.advantages.clone()
            sequence.advantages[keep] = torch.tensor(data.draw(numbers))
    assert_matches_reference(config, batch)


def _around_bound(bound: float) -> Tensor:
    """fp32 log-ratios whose fp32 ratios are just below, exactly on, and just above an fp32 bound."""
    start = math.log(bound)
    # Neighbours of 1 are 6e-8 apart and those of its logarithm much less, so that several of these share a ratio.
    log_ratios = torch.linspace(start - 4e-7 * max(1, abs(start)), start + 4e-7 * max(1, abs(start)), 81)
    ratios = log_ratios.exp()
    exact = torch.tensor(bound)
    chosen = [log_ratios[ratios < exact].max(), log_ratios[ratios == exact][0], log_ratios[ratios > exact].min()]
    return torch.stack(chosen)


def test_ratio_on_the_bound_is_inside() -> None:
    log_ratio = torch.cat([_around_bound(0.8), _around_bound(1.28)])
    inputs = single_sequence(log_ratio, torch.ones(6)).pack(loss_config())
    metrics = policy_loss(loss_config(), **inputs).metrics
    assert (metrics["left_of_clip"], metrics["right_of_clip"]) == (1, 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_beyond_20_the_value_is_clamped_and_the_gradient_is_not_zeroed(objective: str) -> None:
    log_ratio = torch.tensor([50.0, -50.0, 1e4, -1e4])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # none of these is clipped by ce_gppo or ppo_clip
    config = loss_config(objective)
    batch = single_sequence(log_ratio, advantages)
    if objective == "gspo":  # its ratio is the sequence's
        batch = one_token_sequences(log_ratio, advantages)
    assert policy_loss(config, **batch.pack(config)).metrics["clamped_log_ratio"] == 4
    assert_matches_reference(config, batch)
    assert all((gradient != 0).all() for gradient in run_policy_loss(config, batch).logprobs)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(-5, 5, width=32)), min_size=1, max_size=20),
    st.floats(0, 2),
    st.floats(0, 2),
    st.integers(1, 1000),
)
def test_gradient_is_equation_10(
    tokens: list[tuple[float, float]], beta1: float, beta2: float, denominator: int
) -> None:
    log_ratio, advantages = torch.tensor(tokens).T
    config = loss_config(beta1=beta1, beta2=beta2)
    inputs = single_sequence(log_ratio, advantages).pack(config) | {"denominator": denominator}
    logprobs = inputs["logprobs"].requires_grad_()
    policy_loss(config, **inputs).loss.backward()
    ratio = log_ratio.exp()
    weight = torch.where((ratio < 0.8) & (advantages < 0), beta1 * 0.8, log_ratio.double().exp())
    weight = torch.where((ratio > 1.28) & (advantages > 0), beta2 * 1.28, weight)
    torch.testing.assert_close(
        logprobs.grad.double(), -weight * advantages.double() / denominator, rtol=2e-6, atol=1e-30
    )


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.5, 8.0]),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from([None, 2.0]),
)
def test_ce_gppo_without_betas_has_exactly_the_gradient_of_ppo_clip(
    seed: int, lengths: list[int], scale: float, aggregation: str, dual_clip: float | None
) -> None:
    batch = random_batch(seed, [*lengths, 1], log_ratio_scale=scale, token_advantages=True)
    shared = {"aggregation": aggregation, "dual_clip": dual_clip}
    ce_gppo = run_policy_loss(loss_config("ce_gppo", beta1=0.0, beta2=0.0, **shared), batch)
    ppo_clip = run_policy_loss(loss_config("ppo_clip", **shared), batch)
    assert torch.equal(torch.cat(ce_gppo.logprobs), torch.cat(ppo_clip.logprobs))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_split_and_order_do_not_matter(data: st.DataObject) -> None:
    """Losses and gradients of micro-batches add up to those of the update, packed in any order, empty ones included."""
    objective = data.draw(st.sampled_from(OBJECTIVES))
    aggregation = data.draw(st.sampled_from(AGGREGATIONS))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    batch = random_batch(data.draw(st.integers(0, 2**31)), [*lengths, 3], group_size=data.draw(st.integers(1, 4)))
    config = loss_config(objective, aggregation=aggregation, **EXTRAS["all"])
    order = data.draw(st.permutations(range(len(batch.sequences))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]

    expected = reference_loss(config, batch)
    outputs = [run_policy_loss(config, batch, part) for part in parts]
    assert abs(sum(output.loss for output in outputs) - expected.loss) <= 2e-6 * expected.magnitude
    for part, output in zip(parts, outputs, strict=True):
        assert_gradients(output, expected, part)


def test_gspo_gradient_is_that_of_its_sequence_objective() -> None:
    """The token form against Eq. 5 of arXiv 2507.18071, differentiated through the sequence's ratio."""
    batch = random_batch(3, [4, 7, 2], log_ratio_scale=0.2)
    config = loss_config("gspo", aggregation="seq_mean_token_mean", clip_low=0.05, clip_high=0.05)
    for sequence, actual in zip(batch.sequences, run_policy_loss(config, batch).logprobs, strict=True):
        keep = sequence.loss_mask
        logprobs = sequence.logprobs[keep].double().requires_grad_()
        ratio = (logprobs - sequence.old_logprobs[keep]).mean().exp()
        advantage = sequence.advantages[keep][0].double()
        (-torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage) / len(batch.sequences)).backward()
        torch.testing.assert_close(actual[keep].double(), logprobs.grad, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_loss_token_gives_zero_with_a_gradient(objective: str, lengths: list[int]) -> None:
    """No token at all, and only masked ones, all of them NaN or Inf."""
    for aggregation in AGGREGATIONS:
        config = loss_config(objective, aggregation=aggregation, **EXTRAS["all"])
        inputs = random_batch(2, lengths).pack(config) | {"denominator": 7, "num_correct_tokens": 0}
        logprobs, entropy = inputs["logprobs"].requires_grad_(), inputs["entropy"].requires_grad_()
        output = policy_loss(config, **inputs)
        with torch.autograd.detect_anomaly():  # no NaN on the way either
            output.loss.backward()
        assert output.loss == 0
        assert torch.equal(logprobs.grad, torch.zeros_like(logprobs))
        assert torch.equal(entropy.grad, torch.zeros_like(entropy))
        assert all(value == 0 for value in (output.metrics | output.maxima).values())


def test_metrics() -> None:
    log_ratio = torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.0, 30.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    config = loss_config()
    inputs = single_sequence(log_ratio, advantages).pack(config)
    inputs["entropy"] = torch.arange(6.0)
    inputs["ref_logprobs"] = log_ratio - 0.1
    inputs["rollout_logprobs"] = torch.tensor([0.0, 0.2, -0.1, 0.0, 0.0, 0.0])
    output = policy_loss(config, **inputs)
    clamped = log_ratio.clamp(max=20).double()
    expected = {
        "num_tokens": 6,
        "left_of_clip": 2,
        "right_of_clip": 3,
        "ratio": clamped.exp().sum().item(),
        "clamped_log_ratio": 1,
        "approx_kl": (clamped.exp() - 1 - clamped).sum().item(),
        "entropy": 15.0,
        "reference_kl": 6 * (torch.tensor(-0.1).double().exp().item() - 1 + 0.1),
        "rollout_logprob_diff": -0.1,
        "abs_rollout_logprob_diff": 0.3,
    }
    assert {name: output.metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {name: value.item() for name, value in output.maxima.items()} == pytest.approx(
        {"ratio": torch.tensor(20.0).exp().item(), "abs_ratio_minus_one": 4.8516e8, "abs_rollout_logprob_diff": 0.2},
        rel=1e-4,
    )
    for value in (output.metrics | output.maxima).values():
        assert (value.dtype, value.dim(), value.requires_grad) == (torch.float32, 0, False)


@pytest.mark.parametrize(
    ("correction", "weights", "corrected"),
    [("truncated", [0.25, 0.5, 1.0, 2.0, 2.0], 1), ("masked", [0.0, 0.5, 1.0, 2.0, 0.0], 2)],
)
def test_importance_correction(correction: str, weights: list[float], corrected: int) -> None:
    """By hand: what the engine thought four times as likely, ..., and a quarter as likely as the old policy did."""
    config = loss_config("ppo_clip", importance_correction=correction)
    inputs = single_sequence(torch.zeros(5), torch.ones(5)).pack(config)
    inputs["rollout_logprobs"] = -torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]).log()
    logprobs = inputs["logprobs"].requires_grad_()
    output = policy_loss(config, **inputs)
    output.loss.backward()
    assert (-5 * logprobs.grad).tolist() == pytest.approx(weights)
    assert output.metrics["importance_weight"] == pytest.approx(sum(weights))
    assert output.metrics["squared_importance_weight"] == pytest.approx(sum(weight**2 for weight in weights))
    assert output.metrics["importance_corrected"] == corrected


@pytest.mark.parametrize(
    ("correction", "level", "weights"),
    [
        ("truncated", "sequence", [2.0] * 3 + [0.125] * 2),  # 2 * 2 * 1 is above the cap of 2, and 0.25 * 0.5 below 1/2
        ("masked", "sequence", [0.0] * 5),
        ("truncated", "geometric", [4 ** (1 / 3)] * 3 + [0.125**0.5] * 2),
        ("masked", "geometric", [4 ** (1 / 3)] * 3 + [0.0] * 2),
    ],
)
def test_importance_correction_of_sequences(correction: str, level: str, weights: list[float]) -> None:
    """By hand: two sequences, of three tokens and of two."""
    config = loss_config("ppo_clip", importance_correction=correction, importance_level=level)
    inputs = single_sequence(torch.zeros(5), torch.ones(5)).pack(config)
    inputs["cu_seqlens"] = torch.tensor([0, 3, 5], dtype=torch.int32)
    inputs["sequence_lengths"] = torch.tensor([3, 2])
    inputs["group_lengths"] = inputs["correct"] = None
    inputs["rollout_logprobs"] = -torch.tensor([2.0, 2.0, 1.0, 0.25, 0.5]).log()
    logprobs = inputs["logprobs"].requires_grad_()
    policy_loss(config, **inputs).loss.backward()
    assert (-5 * logprobs.grad).tolist() == pytest.approx(weights)


def test_approx_kl_is_an_unbiased_estimate_of_kl_old_new() -> None:
    """Its expectation under the old policy, over a vocabulary of 50, is KL(old || new)."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 50, generator=generator).log_softmax(dim=1)
    config = loss_config()
    per_token = []
    for old_logprob, logprob in zip(old, new, strict=True):
        inputs = single_sequence(logprob[None], torch.ones(1)).pack(config) | {"old_logprobs": old_logprob[None]}
        per_token.append(policy_loss(config, **inputs).metrics["approx_kl"])
    expectation = (old.exp() * torch.stack(per_token)).sum()
    assert expectation.item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"objective": "gspo"}, "cu_seqlens"),
        ({"objective": "gspo"}, "sequence_lengths"),
        ({"aggregation": "group_token_mean"}, "cu_seqlens"),
        ({"aggregation": "group_token_mean"}, "group_lengths"),
        ({"aggregation": "seq_mean_token_mean"}, "cu_seqlens"),
        ({"aggregation": "seq_mean_token_mean"}, "sequence_lengths"),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"importance_correction": "masked"}, "rollout_logprobs"),
        ({"importance_correction": "masked", "importance_level": "sequence"}, "sequence_lengths"),
        ({"importance_correction": "masked", "importance_level": "geometric"}, "cu_seqlens"),
        ({"entropy_coef": 0.1}, "entropy"),
        ({"nll_coef": 0.1}, "cu_seqlens"),
        ({"nll_coef": 0.1}, "correct"),
        ({"nll_coef": 0.1}, "num_correct_tokens"),
    ],
)
def test_missing_input_is_named(settings: dict, missing: str) -> None:
    config = loss_config(**settings)
    with pytest.raises(ValueError, match=f"^{missing} is missing"):
        policy_loss(config, **random_batch(1, [3]).pack(config) | {missing: None})


def test_only_needed_inputs_are_needed() -> None:
    inputs = random_batch(1, [3]).pack(loss_config())
    needed = ["logprobs", "old_logprobs", "advantages", "loss_mask", "denominator"]
    output = policy_loss(loss_config(), **{name: inputs[name] for name in needed})
    assert output.loss == policy_loss(loss_config(), **inputs).loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denominator": 0}, "denominator = 0"),
        ({"loss_mask": torch.ones(3)}, "loss_mask is torch.float32"),
        ({"advantages": torch.ones(2)}, r"advantages has shape \[2\]"),
        ({"old_logprobs": torch.ones(3, 1)}, r"old_logprobs has shape \[3, 1\]"),
        ({"sequence_lengths": torch.ones(2)}, r"sequence_lengths has shape \[2\]"),
    ],
)
def test_wrong_input_is_named(change: dict, message: str) -> None:
    inputs = single_sequence(torch.zeros(3), torch.ones(3)).pack(loss_config()) | change
    with pytest.raises(ValueError, match=message):
        policy_loss(loss_config(), **inputs)


def test_entropy_bonus_needs_a_differentiable_entropy() -> None:
    config = loss_config(entropy_coef=0.1)
    inputs = random_batch(1, [3]).pack(config)
    inputs["logprobs"].requires_grad_()
    with pytest.raises(ValueError, match="entropy has no gradient"):
        policy_loss(config, **inputs)
    with torch.no_grad():
        assert policy_loss(config, **inputs).loss.isfinite()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_denominator(aggregation: str) -> None:
    update = UpdateBatch([], num_loss_tokens=100, num_loss_sequences=9, num_loss_groups=4, num_correct_tokens=30)
    expected = {"token_mean": 100, "group_token_mean": 4, "seq_mean_token_mean": 9, "seq_mean_token_sum_norm": 9 * 64}
    config = loss_config(aggregation=aggregation)
    assert loss_denominator(config, update, max_response_tokens=MAX_RESPONSE_TOKENS) == expected[aggregation]
    assert loss_denominator(config, UpdateBatch([], 0, 0, 0, 0), max_response_tokens=MAX_RESPONSE_TOKENS) == 1


def test_sum_norm_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="max_response_tokens is missing"):
        loss_denominator(loss_config(aggregation="seq_mean_token_sum_norm"), UpdateBatch([], 1, 1, 1, 1))
