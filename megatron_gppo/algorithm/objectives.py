"""The objectives, token by token: what a token's advantage is multiplied with.

Notation: lp = log π_θ, δ = ratio to the old policy, sg() stops the gradient, A the advantage. All tensors are [T] fp32.

The gradient of every objective is F · A · ∇lp with a factor F that needs no gradient itself, so a token's objective is
formed as A · (value + F · (lp - sg(lp))): the difference is 0 and has the gradient of lp. Unlike δ/sg(δ) it is not NaN
when δ overflows or underflows. sg(δ) comes from a log-ratio clamped to ±20, so a clamped token keeps a gradient, of
weight e^±20.

Branches are taken on the fp32 ratio against bounds rounded once to fp32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.config import LossConfig

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class ImportanceRatio:
    """Ratio of the policy to the old policy, in which the objective takes its branches. No gradient. All [T]."""

    ratio: Tensor  # fp32, in [e^-20, e^20]
    was_clamped: Tensor  # bool, the log-ratio was beyond ±20
    left: Tensor  # bool, ratio < 1 - clip_low
    right: Tensor  # bool, ratio > 1 + clip_high


@torch.no_grad()
def importance_ratio(config: LossConfig, log_ratio: Tensor) -> ImportanceRatio:
    """log_ratio: [T] fp32, of the token, or for gspo of its sequence (sequence_mean)."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ImportanceRatio(
        ratio=ratio,
        was_clamped=log_ratio.abs() > MAX_LOG_RATIO,
        left=ratio < 1.0 - config.clip_low,
        right=ratio > 1.0 + config.clip_high,
    )


@torch.no_grad()
def sequence_mean(
    values: Tensor, sequence: Tensor, sequence_lengths: Tensor, cp_group: dist.ProcessGroup | None
) -> Tensor:
    """[T] -> [T]: each token receives the mean over its whole sequence, the parts on other cp ranks included.

    values are 0 where the loss mask is false; sequence is the index of each token's sequence (sequence_of_token).
    Summed in fp64: the clip range of gspo is 1e-4 wide, and no order of summation may matter against it.
    """
    sums = torch.zeros(len(sequence_lengths), dtype=torch.float64, device=values.device)
    sums.index_add_(0, sequence, values.double())
    if cp_group is not None:
        dist.all_reduce(sums, group=cp_group)
    return (sums / sequence_lengths.clamp(min=1)).float()[sequence]


def surrogate(config: LossConfig, logprobs: Tensor, advantages: Tensor, importance: ImportanceRatio) -> Tensor:
    """The objective of each token, to maximise: [T] fp32, differentiable in logprobs with gradient F · A.

    ce_gppo   arXiv 2509.20712 Eq. 8; its F is that of Eq. 10
    ppo_clip  min(δA, clip(δ)A), as GRPO uses it (arXiv 2402.03300 Eq. 3)
    dapo      arXiv 2503.14476 Eq. 8: ppo_clip with clip_low and clip_high apart (as all objectives here have them);
              its token-level mean is the aggregation token_mean
    cispo     arXiv 2506.13585 Eq. 4: sg(clip(δ)) · A · lp
    gspo      arXiv 2507.18071 Eq. 5, in the token form of its Section 4.3: δ is the sequence's ratio, with the
              gradient of the token. Summed over a sequence of one advantage that is the gradient of Eq. 5, and the
              backward needs no communication where context parallelism cuts a sequence

    dual_clip (arXiv 1912.09729) bounds the ratio of tokens with A < 0 by c: the objective of a token beyond it is the
    constant cA. cispo has bounded its weight already; there c bounds that weight further.
    """
    factor = gradient_factor(config, advantages, importance)
    if config.objective == "cispo":
        return factor * advantages * logprobs
    if config.objective == "ce_gppo":
        value = factor
    else:
        acting_left, acting_right = acting(config, importance, advantages)
        value = torch.where(acting_left, 1.0 - config.clip_low, importance.ratio)
        value = torch.where(acting_right, 1.0 + config.clip_high, value)
    if config.dual_clip is not None:
        value = torch.where(_beyond(config.dual_clip, advantages, importance), config.dual_clip, value)
    return advantages * (value + factor * (logprobs - logprobs.detach()))


@torch.no_grad()
def gradient_factor(config: LossConfig, advantages: Tensor, importance: ImportanceRatio) -> Tensor:
    """F of each token: [T] fp32, with which the gradient of its objective is F · A · ∇lp. For ce_gppo, Eq. 10."""
    if config.objective == "cispo":
        factor = importance.ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
        if config.dual_clip is not None:
            factor = torch.where(advantages < 0, factor.clamp(max=config.dual_clip), factor)
        return factor
    left = right = 0.0
    if config.objective == "ce_gppo":
        assert config.beta1 is not None
        assert config.beta2 is not None
        left, right = config.beta1 * (1.0 - config.clip_low), config.beta2 * (1.0 + config.clip_high)
    acting_left, acting_right = acting(config, importance, advantages)
    factor = torch.where(acting_left, left, importance.ratio)
    factor = torch.where(acting_right, right, factor)
    if config.dual_clip is not None:
        factor = torch.where(_beyond(config.dual_clip, advantages, importance), 0.0, factor)
    return factor


def _beyond(dual_clip: float, advantages: Tensor, importance: ImportanceRatio) -> Tensor:
    return (advantages < 0) & (importance.ratio > dual_clip)


def acting(config: LossConfig, importance: ImportanceRatio, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """[T] bool each: tokens that the bounds act on, NA&LP (left, A < 0) and PA&LP (right, A > 0); cispo's, with any A."""
    if config.objective == "cispo":
        return importance.left & (advantages != 0), importance.right & (advantages != 0)
    return importance.left & (advantages < 0), importance.right & (advantages > 0)
