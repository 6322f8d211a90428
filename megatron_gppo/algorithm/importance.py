"""Correction for the engine not being quite the old policy: the same weights, computed by other kernels, sample differently.

Responses are drawn from the engine's distribution, while the ratio compares with the old policy's as the trainer computes
it. An objective over the engine's samples is unbiased when each token is weighed with

    w = old policy's probability / engine's probability

which a few tokens can make very large. truncated: min(w, cap); masked: w between 1/cap and cap, 0 outside. With gspo w is
the sequence's, the geometric mean over its tokens, as its ratio is. Weights have no gradient and multiply the objective only;
the KL, entropy and NLL terms and the denominator stay as they are.
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
def engine_correction(config: LossConfig, rollout_diff: Tensor) -> EngineCorrection:
    """rollout_diff: [T] fp32, log-prob by the old policy minus that by the engine, for gspo its mean over the sequence."""
    weight = rollout_diff.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    too_large = weight > config.importance_cap
    if config.importance_correction == "truncated":
        return EngineCorrection(weight.clamp(max=config.importance_cap), too_large)
    outside = too_large | (weight < 1.0 / config.importance_cap)
    return EngineCorrection(weight.masked_fill(outside, 0.0), outside)
