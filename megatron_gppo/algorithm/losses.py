"""The policy loss of one micro-batch: objective, KL to a reference policy, entropy bonus, NLL on correct samples.

Every rank and micro-batch of an update divides by the same global count, so their losses, and their gradients, add up
to those of the update however it was cut.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.algorithm.aggregation import sequence_of_token, token_weights
from megatron_gppo.algorithm.dynamics import entropy_dynamics, ratio_histogram
from megatron_gppo.algorithm.importance import EngineCorrection, engine_correction
from megatron_gppo.algorithm.inputs import check_lengths, needed
from megatron_gppo.algorithm.objectives import (
    MAX_LOG_RATIO,
    ImportanceRatio,
    gradient_factor,
    importance_ratio,
    sequence_mean,
    surrogate,
)
from megatron_gppo.config import LossConfig


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A micro-batch's loss on this rank and what was seen on the way. Tensors are fp32, 0-dim unless said otherwise."""

    loss: Tensor  # to minimise; add up over micro-batches and ranks
    metrics: dict[str, Tensor]  # sums over loss tokens, detached; add up likewise
    maxima: dict[str, Tensor]  # over loss tokens, detached, 0 without any; reduce by maximum
    ratio_histogram: Tensor  # [B] loss tokens by ratio, the buckets of dynamics.LOG_RATIO_BOUNDS; add up


def policy_loss(
    config: LossConfig,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    denominator: int,
    cu_seqlens: Tensor | None = None,
    sequence_lengths: Tensor | None = None,
    group_lengths: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    correct: Tensor | None = None,
    num_correct_tokens: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """The loss of one micro-batch, of T packed tokens in S sequences:

        sum_t weight_t * (-w_t * surrogate_t + kl_coef * kl_t - entropy_coef * entropy_t) / denominator
        + nll_coef / num_correct_tokens * sum over tokens of correct samples of -logprob_t

    surrogate is the objective's (objectives.py, with the equations); w_t is 1 unless importance_correction is set
    (importance.py); weight_t and denominator are the aggregation's (aggregation.py; loss_denominator gives the count). For
    ce_gppo, d loss / d logprob_t is -F_t * A_t * w_t * weight_t / denominator with F of Eq. 10 (arXiv 2509.20712).

    Entries where loss_mask is false may hold anything, NaN included: they reach neither the loss nor a gradient. Without
    any loss token the loss is 0 and still has a gradient, of zeros.

    Args:
        config: objective and coefficients.
        logprobs: [T] fp32, log-probs of the policy in training, differentiable.
        old_logprobs: [T] fp32, of the policy before the step's first update.
        advantages: [T] fp32.
        loss_mask: [T] bool, true where a response token counts.
        denominator: the update's global count of tokens, groups or sequences, as config.aggregation needs.
        cu_seqlens: [S+1] int32, bounds of the sequences (with context parallelism: of their parts) in these T tokens.
            Needed, like sequence_lengths, by gspo, seq_mean_token_mean and importance_correction above the level of
            tokens, and by group_token_mean and nll_coef > 0.
        sequence_lengths: [S] int64, loss tokens of the whole sequence, also where this rank holds a part of it.
        group_lengths: [S] int64, loss tokens of the sequence's group in the update. Needed by group_token_mean.
        entropy: [T] fp32, in nats. Needed, and differentiable, for entropy_coef > 0; otherwise a metric.
        ref_logprobs: [T] fp32, of the reference policy. Needed for kl_coef > 0; otherwise a metric.
        rollout_logprobs: [T] fp32, as the engine reported them. Needed for importance_correction; otherwise a metric.
        correct: [S] bool, whether the response is correct. Needed for nll_coef > 0.
        num_correct_tokens: the update's global count of loss tokens of correct samples. Needed for nll_coef > 0.
        cp_group: the ranks that hold parts of the same sequences; None when sequences are whole. gspo and
            importance_correction of sequences communicate over it, so each of its ranks must call with the same S.

    Raises ValueError for an input that is missing or has another shape, naming it.
    """
    if denominator <= 0:
        raise ValueError(f"denominator = {denominator}, not a positive count. Fix: pass loss_denominator's result")
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask is {loss_mask.dtype}. Fix: pass torch.bool")
    check_lengths(
        logprobs.numel(),
        "T of logprobs",
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    sequence = None  # [T], index of the token's sequence
    if cu_seqlens is not None:
        sequence = sequence_of_token(cu_seqlens, logprobs.numel())
        check_lengths(
            len(cu_seqlens) - 1,
            "S of cu_seqlens",
            sequence_lengths=sequence_lengths,
            group_lengths=group_lengths,
            correct=correct,
        )

    logprobs = _unmasked(logprobs, loss_mask)
    old_logprobs = _unmasked(old_logprobs.detach(), loss_mask)
    advantages = _unmasked(advantages.detach(), loss_mask)
    log_ratio = logprobs.detach() - old_logprobs

    def of_sequence(values: Tensor, setting: str) -> Tensor:
        """[T] log-ratios: of each token, the mean over its sequence."""
        lengths = needed(sequence_lengths, "sequence_lengths", setting)
        return sequence_mean(values, needed(sequence, "cu_seqlens", setting), lengths, cp_group)

    importance = importance_ratio(
        config, of_sequence(log_ratio, "objective = gspo") if config.objective == "gspo" else log_ratio
    )

    token_loss = -surrogate(config, logprobs, advantages, importance)
    gradient_weights = (gradient_factor(config, advantages, importance) * advantages).abs()
    rollout_diff = None if rollout_logprobs is None else old_logprobs - _unmasked(rollout_logprobs.detach(), loss_mask)
    correction = None
    if config.importance_correction is not None:
        setting = f"importance_correction = {config.importance_correction}"
        log_weight = needed(rollout_diff, "rollout_logprobs", setting)
        if config.correction_level != "token":
            log_weight = of_sequence(log_weight, f"{setting} at the level of {config.correction_level}")
        if config.correction_level == "sequence":
            assert sequence is not None
            assert sequence_lengths is not None
            log_weight = log_weight * sequence_lengths[sequence]
        correction = engine_correction(config, log_weight)
        token_loss = token_loss * correction.weight
        gradient_weights = gradient_weights * correction.weight
    reference_kl = None
    if ref_logprobs is not None:
        reference_kl = _reference_kl(config, logprobs, _unmasked(ref_logprobs.detach(), loss_mask))
    if config.kl_coef > 0:
        setting = f"kl_coef = {config.kl_coef}"
        token_loss = token_loss + config.kl_coef * needed(reference_kl, "ref_logprobs", setting)
    if config.entropy_coef > 0:
        setting = f"entropy_coef = {config.entropy_coef}"
        bonus = needed(entropy, "entropy", setting)
        if logprobs.requires_grad and not bonus.requires_grad:
            raise ValueError(f"entropy has no gradient, and {setting} needs one. Fix: pass entropy_requires_grad=True")
        token_loss = token_loss - config.entropy_coef * _unmasked(bonus, loss_mask)
    weights = token_weights(config, sequence, sequence_lengths, group_lengths)
    if weights is not None:
        token_loss = token_loss * weights
        gradient_weights = gradient_weights * weights
    loss = _unmasked(token_loss, loss_mask).sum() / denominator
    if config.nll_coef > 0:
        setting = f"nll_coef = {config.nll_coef}"
        is_correct = needed(correct, "correct", setting)[needed(sequence, "cu_seqlens", setting)]
        # Without a correct token in the update the sum is empty: the term is 0, not 0 / 0.
        count = max(needed(num_correct_tokens, "num_correct_tokens", setting), 1)
        loss = loss - config.nll_coef / count * _unmasked(logprobs, is_correct).sum()

    metrics, maxima = _metrics(loss_mask, log_ratio, importance, entropy, reference_kl, rollout_diff, correction)
    metrics |= entropy_dynamics(
        config,
        logprobs=logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        importance=importance,
        gradient_weights=gradient_weights / denominator,
    )
    return LossOutput(loss, metrics, maxima, ratio_histogram(importance, loss_mask))


def _unmasked(values: Tensor, mask: Tensor) -> Tensor:
    """values in fp32, 0 where mask is false. A product with the mask would let NaN through, into the gradient too."""
    return torch.where(mask, values.float(), 0.0)


def _reference_kl(config: LossConfig, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimates of KL(policy || reference) from one token each: [T] fp32, differentiable in logprobs.

    With r = log(policy / reference), clamped to ±20 in value: k1 = r, k2 = r² / 2, k3 = e^-r - 1 + r
    (Schulman, "Approximating KL Divergence"). All three are differentiated as they stand. On-policy the expected
    gradient of k1 is then 0, that of k2 is the gradient of this KL, and that of k3 is the gradient of KL(reference || policy).
    """
    r = (logprobs.detach() - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match config.kl_estimator:
        case "k1":
            value, slope = r, torch.ones_like(r)
        case "k2":
            value, slope = 0.5 * r * r, r
        case "k3":
            # The slope 1 - e^-r would lose its digits near 0 if autograd added up its two terms.
            value, slope = _expm1_minus(-r), -torch.expm1(-r)
    return value + slope * (logprobs - logprobs.detach())


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x in fp32. In fp64 meanwhile: its terms cancel but for x² / 2, which for small x is all that is left."""
    x = x.double()
    return (torch.expm1(x) - x).float()


@torch.no_grad()
def _metrics(
    loss_mask: Tensor,
    log_ratio: Tensor,
    importance: ImportanceRatio,
    entropy: Tensor | None,
    reference_kl: Tensor | None,
    rollout_diff: Tensor | None,
    correction: EngineCorrection | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(sums, maxima) over loss tokens. With gspo the ratio, and all that is said of it, is the sequence's."""

    def total(values: Tensor) -> Tensor:
        return _unmasked(values, loss_mask).sum()

    def largest(values: Tensor) -> Tensor:
        # The zero beside them stands for the maximum over no token at all.
        return torch.cat([_unmasked(values, loss_mask), loss_mask.new_zeros(1, dtype=torch.float32)]).amax()

    token_log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = {
        "num_tokens": total(loss_mask),
        "left_of_clip": total(importance.left),
        "right_of_clip": total(importance.right),
        "ratio": total(importance.ratio),
        "clamped_log_ratio": total(importance.was_clamped),
        # Of KL(old || policy), unbiased because the tokens are the old policy's and E[ratio] = 1: ratio - 1 - log ratio.
        "approx_kl": total(_expm1_minus(token_log_ratio)),
    }
    maxima = {"ratio": largest(importance.ratio), "abs_ratio_minus_one": largest((importance.ratio - 1.0).abs())}
    if entropy is not None:
        metrics["entropy"] = total(entropy)
    if reference_kl is not None:
        metrics["reference_kl"] = total(reference_kl)
    if rollout_diff is not None:
        metrics["rollout_logprob_diff"] = total(rollout_diff)  # the old policy's minus the engine's
        metrics["abs_rollout_logprob_diff"] = total(rollout_diff.abs())
        maxima["abs_rollout_logprob_diff"] = largest(rollout_diff.abs())
    if correction is not None:
        metrics["importance_weight"] = total(correction.weight)
        metrics["squared_importance_weight"] = total(correction.weight.square())
        metrics["importance_corrected"] = total(correction.acted)
    return metrics, maxima
