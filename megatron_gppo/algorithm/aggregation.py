"""From per-token losses to one number: the weight of each token, and the one global count that divides the sum.

    loss of an update = sum over micro-batches and ranks of  sum_t weight_t * loss_t / denominator

| aggregation             | weight_t                      | denominator                                   |
|-------------------------|-------------------------------|-----------------------------------------------|
| token_mean              | 1                             | loss tokens                                   |
| group_token_mean        | 1 / loss tokens of its group  | groups with a loss token                      |
| seq_mean_token_mean     | 1 / loss tokens of its sequence | sequences with a loss token                 |
| seq_mean_token_sum_norm | 1                             | sequences with a loss token * max_response_tokens |

All lengths and counts are of the whole update, known before its first forward, so the sum does not depend on how the
update is cut into micro-batches, data-parallel ranks or context-parallel parts. token_mean is how DAPO and the paper's
released code mean it; group_token_mean is Eq. 8 of arXiv 2509.20712 to the letter; seq_mean_token_mean is its Eq. 3
(GRPO); seq_mean_token_sum_norm divides by a constant instead of a length (Dr. GRPO, arXiv 2503.20783).
"""

import torch
from torch import Tensor

from megatron_gppo.algorithm.inputs import needed
from megatron_gppo.config import LossConfig
from megatron_gppo.datatypes import UpdateBatch


def loss_denominator(config: LossConfig, update: UpdateBatch, *, max_response_tokens: int | None = None) -> int:
    """policy_loss's denominator for this update; see the table above.

    At least 1: an update whose samples are all masked has loss 0, not 0 / 0.
    Raises ValueError when seq_mean_token_sum_norm lacks max_response_tokens, the limit on generated tokens.
    """
    match config.aggregation:
        case "token_mean":
            count = update.num_loss_tokens
        case "group_token_mean":
            count = update.num_loss_groups
        case "seq_mean_token_mean":
            count = update.num_loss_sequences
        case "seq_mean_token_sum_norm":
            count = update.num_loss_sequences * needed(
                max_response_tokens, "max_response_tokens", "aggregation = seq_mean_token_sum_norm"
            )
    return max(count, 1)


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[S+1] -> [T] int64: the sequence that each token belongs to. Tokens after the last bound are padding of the last."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True).clamp_(max=len(cu_seqlens) - 2)


def token_weights(
    config: LossConfig, sequence: Tensor | None, sequence_lengths: Tensor | None, group_lengths: Tensor | None
) -> Tensor | None:
    """[T] fp32, or None where every token weighs 1.

    sequence: [T], from sequence_of_token; the lengths, [S], count loss tokens. Raises ValueError for one that is missing.
    """
    setting = f"aggregation = {config.aggregation}"
    match config.aggregation:
        case "group_token_mean":
            lengths = needed(group_lengths, "group_lengths", setting)
        case "seq_mean_token_mean":
            lengths = needed(sequence_lengths, "sequence_lengths", setting)
        case _:
            return None
    # A sequence without loss tokens has length 0; its tokens are masked, and 1 / 0 would make them NaN.
    return lengths.clamp(min=1).float().reciprocal()[needed(sequence, "cu_seqlens", setting)]
