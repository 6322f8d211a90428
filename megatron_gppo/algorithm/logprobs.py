"""Log-probs of target tokens, and entropy, over a vocabulary cut over tensor-parallel ranks.

Letters: T tokens, H hidden size, V vocabulary, n = V/TP rows of the weight on this rank (tp rank r holds the global ids
[r*n, (r+1)*n)), C columns of a tile.

The forward and the backward both walk over the vocabulary in tiles of C columns and all T tokens; the logits of one tile
are all that ever exists of them, and the backward computes them again. Since a tile holds all tokens, its part of the
weight's gradient is final when the tile is done.

softmax.py has the mathematics, output_layer.py the matrix products, tile_passes.py (on GPUs tile_kernels.py) what is done
between these.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gppo.algorithm.output_layer import (
    HiddenGradient,
    TileLogits,
    WeightGradient,
    WeightTiles,
    centre_of,
    operand_of,
)
from megatron_gppo.algorithm.softmax import LogitGradient, Softmax, SoftmaxSums
from megatron_gppo.algorithm.vocabulary import VocabularyShard, vocabulary_shard


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
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    Beside the inputs, O(T) is kept for the backward. The working memory is one tile, [T, 4096] of the inputs' dtype, and two
    to four times [T, H]. For bf16 on CUDA, the tile also in fp32; on a CPU without instructions for bf16, all of it in fp32,
    and [4096, H].

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
        main_grad: [V/TP, H] fp32, such as Megatron's buffer of this name. The backward adds the weight's gradient to it
            and returns none for the weight, so that no hook of the weight runs for it.

    Returns:
        ([T] log-probs, [T] entropies in nats or None), fp32, the same on every tp rank. Every tp rank must also give
        them the same gradient: hidden's gradient is summed over tp_group (reduce-scattered when sequence_parallel), and
        the weight's is that of this rank's rows.

    Raises ValueError when shapes, dtypes or devices do not fit, or a target is not in the vocabulary. The latter is one
    flag read back from the device, and how many targets each tile has are a few numbers: waits that are small beside the
    matmuls that follow.
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
    if main_grad is not None and (
        main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or main_grad.device != weight.device
    ):
        raise ValueError(
            f"main_grad is {list(main_grad.shape)} {main_grad.dtype} on {main_grad.device}, weight is "
            f"{list(weight.shape)} on {weight.device}. Fix: pass torch.float32 of the weight's shape on its device"
        )
    gather_group = tp_group if sequence_parallel else None
    num_tokens = hidden.shape[0] * (1 if gather_group is None else gather_group.size())
    shard = vocabulary_shard(weight.shape[0], vocab_size, tp_group)
    _check_targets(targets, num_tokens, hidden.device, shard)
    logprobs, entropy = _LinearLogprobs.apply(
        hidden, weight, targets, shard, gather_group, temperature, with_entropy, entropy_requires_grad, main_grad
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

    The logits are never modified, and are what is kept for the backward. Logits of -inf have probability 0. Where all of a
    token are, its log-prob is -inf, its entropy 0, and its gradient finite, as for a target of -inf beside other logits.
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
        main_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        operand = operand_of(_gather_tokens(hidden, gather_group))
        centre = centre_of(operand, weight, targets, shard, temperature)
        centre_values = None if centre is None else centre.values
        sums = SoftmaxSums(targets, shard, temperature, with_entropy=with_entropy, centre=centre)
        weight_tiles = WeightTiles(weight, operand.dtype)
        tile_logits = TileLogits(operand, len(weight), centre_values)
        tiles = shard.tiles(targets)
        for tile in tiles:
            sums.add(tile_logits(weight_tiles(tile.columns)), tile)
        softmax = sums.over_ranks()
        ctx.save_for_backward(hidden, weight, targets, centre_values, *softmax.kept(entropy_requires_grad))
        ctx.shard, ctx.tiles, ctx.gather_group = shard, tiles, gather_group
        ctx.temperature, ctx.main_grad, ctx.dtype = temperature, main_grad, hidden.dtype
        if softmax.entropy is not None and not entropy_requires_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = _linear_gradients(ctx, grad_logprobs, grad_entropy)
        if grad_hidden is not None:
            grad_hidden = _sum_over_ranks(grad_hidden, ctx.shard.group, ctx.gather_group).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _linear_gradients(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden, [T, H] fp32 and this rank's part of the sum, and of the weight, where each is asked for.

    A function of its own, so that the memory of the tiles is free when hidden's gradient is copied to hidden's dtype.
    """
    hidden, weight, targets, centre, *kept = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    shard, softmax = ctx.shard, Softmax(*kept)
    operand = operand_of(_gather_tokens(hidden, ctx.gather_group))
    gradient = LogitGradient(softmax, targets, shard, ctx.temperature, grad_logprobs, grad_entropy, centre=centre)
    weight_tiles = WeightTiles(weight, operand.dtype)
    tile_logits = TileLogits(operand, len(weight), centre)
    of_hidden = HiddenGradient(weight, targets, gradient.of_targets, shard) if needs_hidden else None
    of_weight = WeightGradient(operand, weight, shard, ctx.main_grad, weight_tiles.memory) if needs_weight else None
    for tile in ctx.tiles:
        weight_tile = weight_tiles(tile.columns)
        logits = tile_logits(weight_tile)
        grad = logits if logits.dtype == operand.dtype else torch.empty_like(logits, dtype=operand.dtype)
        gradient.write(logits, tile, out=grad)
        if of_hidden is not None:
            of_hidden.add(grad, weight_tile)
        if of_weight is not None:
            gradient.write_targets(tile, out=grad)
            of_weight.add(grad, tile.columns)  # ends weight_tile
        del grad  # or it would exist beside the next one
    return None if of_hidden is None else of_hidden.sum, None if of_weight is None else of_weight.result


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
        sums = SoftmaxSums(targets, shard, temperature, with_entropy=with_entropy)
        tiles = shard.tiles(targets)
        for tile in tiles:
            sums.add(logits[:, tile.columns], tile)
        softmax = sums.over_ranks()
        ctx.save_for_backward(logits, targets, *softmax.kept(entropy_requires_grad))
        ctx.shard, ctx.tiles, ctx.temperature = shard, tiles, temperature
        if softmax.entropy is not None and not entropy_requires_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, *kept = ctx.saved_tensors
        gradient = LogitGradient(Softmax(*kept), targets, ctx.shard, ctx.temperature, grad_logprobs, grad_entropy)
        grad_logits = torch.empty_like(logits)
        grad_logits[:, ctx.shard.num_columns :] = 0
        for tile in ctx.tiles:
            out = grad_logits[:, tile.columns]
            gradient.write(logits[:, tile.columns], tile, out=out)
            gradient.write_targets(tile, out=out)
        return grad_logits, None, None, None, None, None


def _gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T/TP, H] -> [T, H], in order of rank; hidden itself without a group."""
    if group is None:
        return hidden
    gathered = hidden.new_empty(hidden.shape[0] * group.size(), hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def _sum_over_ranks(
    grad_hidden: Tensor, tp_group: dist.ProcessGroup | None, gather_group: dist.ProcessGroup | None
) -> Tensor:
    """[T, H] summed over tp_group, or the rank's share [T/TP, H] of the sum given a gather_group."""
    if gather_group is not None:
        share = grad_hidden.new_empty(len(grad_hidden) // gather_group.size(), grad_hidden.shape[1])
        dist.reduce_scatter_tensor(share, grad_hidden, group=gather_group)
        return share
    if tp_group is not None:
        dist.all_reduce(grad_hidden, group=tp_group)
    return grad_hidden


def _without_single_rank(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return None if group is None or group.size() == 1 else group


def _check_options(temperature: float, with_entropy: bool, entropy_requires_grad: bool) -> None:
    largest = torch.finfo(torch.float32).max  # logits are multiplied by the reciprocal, in fp32
    if not 1.0 / largest <= temperature <= largest:
        raise ValueError(
            f"temperature = {temperature}. Fix: pass a positive number; it and its reciprocal must fit fp32"
        )
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
