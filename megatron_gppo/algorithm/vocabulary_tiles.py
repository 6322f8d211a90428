"""Softmax over a vocabulary that is visited in tiles of columns, and that is cut over tensor-parallel ranks.

Letters: T tokens, C columns of a tile, z a logit divided by the temperature, m = max z, s = sum e^(z-m).

    log p(y) = z_y - m - log s          d log p(y) / dz = 1[y] - p
    entropy  = log s - sum p (z - m)    d entropy / dz  = -p (log p + entropy)

The sums are kept relative to the largest m so far and rescaled when a tile, or another rank, has a larger one. Keeping
m and log s apart, not their sum, keeps the digits of p where logits are large.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# e^-200 is 0 in fp32. Differences to the maximum stop there, because -inf * e^-inf would be NaN in the entropy.
LOWEST_SHIFTED_LOGIT = -200.0


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The part of the vocabulary on this rank."""

    group: dist.ProcessGroup | None
    first_id: int  # global id of column 0
    num_columns: int  # that are not padding; they come first
    vocab_size: int  # over all ranks, without padding


@dataclass(frozen=True, slots=True)
class Tile:
    """Some columns of this rank, with their logits."""

    first: int
    last: int  # exclusive
    logits: Tensor  # [T, C] fp32, divided by the temperature; its own memory, free to be overwritten


def vocabulary_shard(num_rows: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabularyShard:
    rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    vocab_size = num_rows * size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= num_rows * size:
        raise ValueError(
            f"vocab_size = {vocab_size}. Fix: pass 1 to {num_rows * size}, {size} ranks of {num_rows} rows"
        )
    first_id = rank * num_rows
    return VocabularyShard(tp_group, first_id, min(max(vocab_size - first_id, 0), num_rows), vocab_size)


def reduce_tiles(
    tiles: Iterator[Tile], targets: Tensor, shard: VocabularyShard, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(log-probs, entropy or None, m, s), each [T] fp32 and of the whole vocabulary."""
    # Finite, so that a rank whose columns are all padding adds 0 and not NaN.
    maximum = torch.full(targets.shape, torch.finfo(torch.float32).min, device=targets.device)
    exp_sum = torch.zeros_like(maximum)
    weighted_sum = torch.zeros_like(maximum)  # sum of e^(z-m) * (z-m), for the entropy
    target_logit = torch.zeros_like(maximum)

    def raise_maximum(new_maximum: Tensor) -> None:
        nonlocal maximum
        change = (maximum - new_maximum).clamp_(min=LOWEST_SHIFTED_LOGIT)
        scale = change.exp()
        weighted_sum.add_(change * exp_sum).mul_(scale)
        exp_sum.mul_(scale)
        maximum = new_maximum

    for tile in tiles:
        logits = tile.logits
        column, is_inside = _target_columns(tile, targets, shard)
        target_logit = torch.where(is_inside, logits.gather(1, column[:, None])[:, 0], target_logit)
        raise_maximum(torch.maximum(maximum, logits.amax(dim=1)))
        logits.sub_(maximum[:, None])
        if with_entropy:
            exps = logits.clamp_(min=LOWEST_SHIFTED_LOGIT).exp()
            weighted_sum += logits.mul_(exps).sum(dim=1)
        else:
            exps = logits.exp_()
        exp_sum += exps.sum(dim=1)

    if shard.group is not None:
        whole_maximum = maximum.clone()
        dist.all_reduce(whole_maximum, op=dist.ReduceOp.MAX, group=shard.group)
        raise_maximum(whole_maximum)
        sums = torch.stack([exp_sum, weighted_sum, target_logit])  # the target's logit is on one rank, 0 on the others
        dist.all_reduce(sums, group=shard.group)
        exp_sum, weighted_sum, target_logit = sums.unbind()

    log_sum = exp_sum.log()
    logprobs = target_logit - maximum - log_sum
    entropy = log_sum - weighted_sum / exp_sum if with_entropy else None
    return logprobs, entropy, maximum, exp_sum


def tile_gradient(
    tile: Tile,
    targets: Tensor,
    shard: VocabularyShard,
    temperature: float,
    maximum: Tensor,
    exp_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """[T, C] fp32, gradient of the logits before the division by temperature. Overwrites the tile's logits.

    1[y] * g - p * g - p * (log p + entropy) * g', for the gradients g of the log-prob and g' of the entropy.
    """
    grad_target = grad_logprobs / temperature
    shifted = tile.logits.sub_(maximum[:, None])
    if entropy is None:
        grad = shifted.exp_().mul_((-grad_target / exp_sum)[:, None])
    else:
        assert grad_entropy is not None
        exps = shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).exp()
        constant = grad_logprobs + grad_entropy * (entropy - exp_sum.log())
        grad = shifted.mul_(grad_entropy[:, None]).add_(constant[:, None])
        grad = grad.mul_(exps).mul_((-1.0 / (exp_sum * temperature))[:, None])
    column, is_inside = _target_columns(tile, targets, shard)
    return grad.scatter_add_(1, column[:, None], torch.where(is_inside, grad_target, 0.0)[:, None])


def _target_columns(tile: Tile, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """([T] column in the tile, [T] bool whether the target is in the tile). Columns outside are moved to its edge."""
    column = targets - (shard.first_id + tile.first)
    inside = column.clamp(0, tile.last - tile.first - 1)
    return inside, column == inside
