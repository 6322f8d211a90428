"""What a micro-batch shows of the entropy's dynamics: which tokens move the policy, and how hard.

arXiv 2509.20712 explains entropy by four kinds of tokens (its Figure 1): the advantage is positive or negative (PA, NA),
and the token has a high or a low probability (HP, LP). Raising likely tokens (PA&HP) and lowering unlikely ones (NA&LP)
makes the policy more certain; the other two make it less so.

Everything is a sum over loss tokens, so that micro-batches and ranks add up; scalars.py makes shares and means of them.
A token's gradient weight is |d loss / d logprob| by the objective alone: |F · A| times the aggregation's weight, over the
denominator.
"""

import torch
from torch import Tensor

from megatron_gppo.algorithm.objectives import MAX_LOG_RATIO, ImportanceRatio, acting
from megatron_gppo.config import LossConfig

# Tokens on which a bound acts (beyond it, with the advantage that it is meant for), and the quadrants of Figure 1.
# With an advantage of 0 a token is in no quadrant.
QUADRANTS = ("pa_hp", "pa_lp", "na_hp", "na_lp")
KINDS = ("left", "right", *QUADRANTS)

# Upper bounds of the ratio histogram's buckets, equally wide in the log-ratio, but for the two outermost buckets, which
# hold all that is beyond.
LOG_RATIO_BOUNDS = (*(index / 20 for index in range(-20, 21)), MAX_LOG_RATIO)


@torch.no_grad()
def entropy_dynamics(
    config: LossConfig,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    importance: ImportanceRatio,
    gradient_weights: Tensor,
) -> dict[str, Tensor]:
    """0-dim fp32 sums over loss tokens. All inputs are [T]; where loss_mask is false the fp32 ones are 0.

    tokens_K, gradient_K, probability_K   for each K of KINDS: their number, gradient weight, and probability
    gradient, probability                 of all tokens; probabilities are of the policy in training
    squared_ratio                         for the effective sample size, (Σδ)² / Σδ²
    logprob, weighted_advantage, product  x = log π, y = π · A and x · y, for the covariance in Eq. 7
    """
    probability = torch.where(loss_mask, logprobs.exp(), 0.0)
    likely = probability >= config.high_probability
    positive, negative = (advantages > 0) & loss_mask, (advantages < 0) & loss_mask
    left, right = acting(config, importance, advantages)
    kinds = torch.stack(
        [
            left & loss_mask,
            right & loss_mask,
            positive & likely,
            positive & ~likely,
            negative & likely,
            negative & ~likely,
        ]
    )
    measures = torch.stack([loss_mask.float(), gradient_weights, probability], dim=1)  # [T, 3]
    by_kind = kinds.float() @ measures  # [6, 3]
    sums = {
        f"{measure}_{kind}": by_kind[row, column]
        for row, kind in enumerate(KINDS)
        for column, measure in enumerate(("tokens", "gradient", "probability"))
    }
    weighted_advantage = probability * advantages
    return sums | {
        "gradient": gradient_weights.sum(),
        "probability": probability.sum(),
        "squared_ratio": torch.where(loss_mask, importance.ratio.square(), 0.0).sum(),
        "logprob": logprobs.sum(),
        "weighted_advantage": weighted_advantage.sum(),
        "product": (logprobs * weighted_advantage).sum(),
    }


@torch.no_grad()
def ratio_histogram(importance: ImportanceRatio, loss_mask: Tensor) -> Tensor:
    """Loss tokens by ratio: [len(LOG_RATIO_BOUNDS)] fp32 counts, to be added up like all the rest."""
    upper_bounds = torch.tensor(LOG_RATIO_BOUNDS[:-1], device=loss_mask.device)
    counts = torch.zeros(len(LOG_RATIO_BOUNDS), device=loss_mask.device)
    return counts.index_add_(0, torch.bucketize(importance.ratio.log(), upper_bounds), loss_mask.float())
