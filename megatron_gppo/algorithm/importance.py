"""Correction for the engine not being quite the old policy: its weights may be older (async.staleness), and the same weights,
computed by other kernels, sample differently, too.

Responses are drawn from the engine's distribution μ, while the ratio compares with the old policy π as the trainer computes
it. An objective over the engine's samples is unbiased when it is weighed with the inverse of how much more often μ draws
them than π. With d_t = log π(y_t) - log μ(y_t), the levels at which that is done, for each token of response y of |y| tokens:

    token      w_t = exp(d_t)                    corrects for the token, not for what led to it (as slime's and verl's TIS)
    sequence   w_t = exp(sum over y of d)        unbiased, and of a variance that grows with |y|
    geometric  w_t = exp(sum over y of d / |y|)  the sequence's mean, whatever its length; what GSPO's ratio is

A few weights can become very large, so they are

    truncated  min(w, cap)                       truncated importance sampling (Ionides, 2008)
    masked     w if 1/cap <= w <= cap, else 0    far off samples say nothing

Log-weights are clamped to ±20. Weights have no gradient and multiply the objective only; the KL, entropy and NLL terms and
the denominator stay as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gppo.algorithm.objectives import MAX_LOG_RATIO
from megatron_gppo.config import LossConfig


@dataclass(frozen=True, slots=True)
class EngineCorrection:
    """All [T]. No gradient."""

    weight: Tensor  # fp32, multiplies the token's objective
    acted: Tensor  # bool, truncated or masked


@torch.no_grad()
def engine_correction(config: LossConfig, log_weight: Tensor) -> EngineCorrection:
    """log_weight: [T] fp32, log w of each token at the level of the correction."""
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    too_large = weight > config.importance_cap
    if config.importance_correction == "truncated":
        return EngineCorrection(weight.clamp(max=config.importance_cap), too_large)
    outside = too_large | (weight < 1.0 / config.importance_cap)
    return EngineCorrection(weight.masked_fill(outside, 0.0), outside)
