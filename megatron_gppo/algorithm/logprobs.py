"""Log-probs of target tokens, and entropy, over a vocabulary cut over tensor-parallel ranks.

Letters: T tokens, H hidden size, V vocabulary, n = V/TP rows of the weight on this rank (tp rank r holds the global ids
[r*n, (r+1)*n)), C columns of a tile.

The forward and the backward both walk over the vocabulary in tiles of C columns and all T tokens (vocabulary_tiles.py
has the mathematics); the logits of one tile are all that ever exists of them, and the backward computes them again.
Since a tile holds all tokens, its part of the weight's gradient is final when the tile is done.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gppo.algorithm.vocabulary_tiles import (
    Tile,
    VocabularyShard,
    reduce_tiles,
    tile_gradient,
    vocabulary_shard,
)

TILE_COLUMNS = 2048


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    with_entropy: bool = True,
    entropy_requires_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    Beside the inputs, O(T) is kept for the backward; the working memory is a few [T, 2048] fp32 tiles.

    Args:
        hidden: [T, H] fp32 or bf16; [T/TP, H], the rank's share of the tokens, when sequence_parallel.
        weight: [V/TP, H], same dtype: this rank's rows of the output layer, or of the tied embedding.
        targets: [T] int64, global token ids, the same on every tp rank.
        vocab_size: ids from here on are padding and never count. None: every row counts.
        tp_group: the ranks that share the vocabulary. None: this rank holds all of it.
        sequence_parallel: gather hidden over tp_group, here and again in the backward.
        temperature: logits are divided by it.
        with_entropy: whether to compute the entropy.
        entropy_requires_grad: whether the entropy, too, is differentiable.

    Returns:
        ([T] log-probs, [T] entropies in nats or None), fp32, the same on every tp rank. Every tp rank must also give
        them the same gradient: hidden's gradient is summed over tp_group (reduce-scattered when sequence_parallel), and
        the weight's is that of this rank's rows.

    Raises ValueError when shapes, dtypes or devices do not fit, or a target is not in the vocabulary. The latter reads
    one flag back from the device, a wait that is small beside the matmuls that follow.
    """
    _check_options(temperature, with_entropy, entropy_requires_grad)
    tp_group = _without_single_rank(tp_group)
    _check_matrix("hidden", hidden)
    _check_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has H = {hidden.shape[1]}, weight has H = {weight.shape[1]}. Fix: pass [T, H], [V/TP, H]"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight is {weight.dtype} on {weight.device}. Fix: make them equal"
        )
    gather_group = tp_group if sequence_parallel else None
    num_tokens = hidden.shape[0] * (1 if gather_group is None else gather_group.size())
    shard = vocabulary_shard(weight.shape[0], vocab_size, tp_group)
    _check_targets(targets, num_tokens, hidden.device, shard)
    logprobs, entropy = _LinearLogprobs.apply(
        hidden, weight, targets, shard, gather_group, temperature, with_entropy, entropy_requires_grad
    )
    return logprobs, entropy


def vocab_parallel_logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    entropy_requires_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """linear_logprobs_and_entropy for callers who have logits: [T, V/TP] fp32 or bf16, not yet divided by temperature.

    The logits are never modified, and are what is kept for the backward. Logits of -inf have probability 0.
    The other arguments, the results and the errors are those of linear_logprobs_and_entropy.
    """
    _check_options(temperature, with_entropy, entropy_requires_grad)
    tp_group = _without_single_rank(tp_group)
    _check_matrix("logits", logits)
    shard = vocabulary_shard(logits.shape[1], vocab_size, tp_group)
    _check_targets(targets, logits.shape[0], logits.device, shard)
    logprobs, entropy = _VocabParallelLogprobs.apply(
        logits, targets, shard, temperature, with_entropy, entropy_requires_grad
    )
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        gather_group: dist.ProcessGroup | None,
        temperature: float,
        with_entropy: bool,
        entropy_requires_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tiles = _linear_tiles(_gather_tokens(hidden, gather_group), weight, shard, temperature)
        logprobs, entropy, maximum, exp_sum = reduce_tiles(tiles, targets, shard, with_entropy)
        ctx.save_for_backward(hidden, weight, targets, maximum, exp_sum, entropy if entropy_requires_grad else None)
        ctx.shard, ctx.gather_group, ctx.temperature = shard, gather_group, temperature
        if entropy is not None and not entropy_requires_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, maximum, exp_sum, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        shard, group = ctx.shard, ctx.shard.group
        gathered = _gather_tokens(hidden, ctx.gather_group)
        # In fp32 also for bf16 inputs: it is a sum over the tiles and then over the ranks.
        grad_hidden = torch.zeros_like(gathered, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        if grad_weight is not None:
            grad_weight[shard.num_columns :] = 0
        for tile in _linear_tiles(gathered, weight, shard, ctx.temperature):
            grad = tile_gradient(
                tile, targets, shard, ctx.temperature, maximum, exp_sum, entropy, grad_logprobs, grad_entropy
            ).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += _matmul_to_fp32(grad, weight[tile.first : tile.last])
            if grad_weight is not None:
                torch.mm(grad.t(), gathered, out=grad_weight[tile.first : tile.last])
        if grad_hidden is not None:
            if ctx.gather_group is not None:
                share = torch.empty_like(hidden, dtype=torch.float32)
                dist.reduce_scatter_tensor(share, grad_hidden, group=group)
                grad_hidden = share
            elif group is not None:
                dist.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        with_entropy: bool,
        entropy_requires_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tiles = _logits_tiles(logits, shard, temperature)
        logprobs, entropy, maximum, exp_sum = reduce_tiles(tiles, targets, shard, with_entropy)
        ctx.save_for_backward(logits, targets, maximum, exp_sum, entropy if entropy_requires_grad else None)
        ctx.shard, ctx.temperature = shard, temperature
        if entropy is not None and not entropy_requires_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, maximum, exp_sum, entropy = ctx.saved_tensors
        shard = ctx.shard
        grad_logits = torch.empty_like(logits)
        grad_logits[:, shard.num_columns :] = 0
        for tile in _logits_tiles(logits, shard, ctx.temperature):
            grad_logits[:, tile.first : tile.last] = tile_gradient(
                tile, targets, shard, ctx.temperature, maximum, exp_sum, entropy, grad_logprobs, grad_entropy
            )
        return grad_logits, None, None, None, None, None


def _linear_tiles(hidden: Tensor, weight: Tensor, shard: VocabularyShard, temperature: float) -> Iterator[Tile]:
    for first in range(0, shard.num_columns, TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, shard.num_columns)
        logits = _matmul_to_fp32(hidden, weight[first:last].t())
        yield Tile(first, last, logits if temperature == 1.0 else logits.div_(temperature))


def _logits_tiles(logits: Tensor, shard: VocabularyShard, temperature: float) -> Iterator[Tile]:
    for first in range(0, shard.num_columns, TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, shard.num_columns)
        copied = logits[:, first:last].to(torch.float32, copy=True)
        yield Tile(first, last, copied if temperature == 1.0 else copied.div_(temperature))


def _matmul_to_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in fp32."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    # The CPU lacks a bf16 matmul with an fp32 result. Its fp32 matmul, told that it may round inputs to bf16, is one:
    # these inputs are bf16 already. Results stay exact, at the speed of the bf16 units.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return torch.mm(left.float(), right.float())
    finally:
        matmul.fp32_precision = precision


def _gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T/TP, H] -> [T, H], in order of rank; hidden itself without a group."""
    if group is None:
        return hidden
    gathered = hidden.new_empty(hidden.shape[0] * group.size(), hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def _without_single_rank(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return None if group is None or group.size() == 1 else group


def _check_options(temperature: float, with_entropy: bool, entropy_requires_grad: bool) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}. Fix: pass a positive number")
    if entropy_requires_grad and not with_entropy:
        raise ValueError("entropy_requires_grad = True with with_entropy = False. Fix: set both, or neither")


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}. Fix: pass a matrix")
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} is {matrix.dtype}. Fix: pass torch.float32 or torch.bfloat16")


def _check_targets(targets: Tensor, num_tokens: int, device: torch.device, shard: VocabularyShard) -> None:
    if tuple(targets.shape) != (num_tokens,):
        raise ValueError(f"targets has shape {list(targets.shape)}. Fix: pass [{num_tokens}], one id a token")
    if targets.dtype != torch.int64 or targets.device != device:
        raise ValueError(f"targets is {targets.dtype} on {targets.device}. Fix: pass torch.int64 on {device}")
    outside = (targets < 0) | (targets >= shard.vocab_size)
    if outside.any():
        example = targets[outside][0].item()
        raise ValueError(
            f"targets holds {example}, outside the vocabulary of {shard.vocab_size}. Fix: mask it with a valid id"
        )
