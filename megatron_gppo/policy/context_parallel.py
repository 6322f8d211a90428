"""Context parallelism: which tokens of a packed row a rank holds, and how parts become the row again.

Every sequence of a row has a multiple of 2 * cp tokens (packing's sequence_alignment) and is cut into 2 * cp equal chunks.
Rank r holds chunks r and 2 * cp - 1 - r of each: an early one, which sees few keys, and a late one, which sees many, so
that causal attention costs every rank the same. Megatron's rotary embedding and TransformerEngine's attention expect
packed (thd) rows to be cut like this. Targets and masks are aligned with the tokens before the cut, so a token whose
target is on another rank needs nothing from there.

Example. cp = 2, two sequences of 8 and 4 tokens, cu_seqlens = [0, 8, 12]:

    token    0 1 2 3 4 5 6 7   8 9 10 11
    rank     0 0 1 1 1 1 0 0   0 1  1  0

Letters: T tokens of the row, S sequences, R ranks (cp).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_gppo.datatypes import MicroBatch
from megatron_gppo.parallel import ParallelState


def token_positions(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """[S+1] -> [T/R] int64: places in the row of the tokens that `rank` holds, in the order in which it holds them."""
    starts, chunk = cu_seqlens[:-1], cu_seqlens.diff() // (2 * size)
    return runs(
        _early_and_late(starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk), _early_and_late(chunk, chunk)
    )


def visible_keys(cu_seqlens: torch.Tensor, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each chunk that `rank` holds sees of its sequence: everything up to its own end.

    Returns (places in the row of these keys, chunk after chunk: [T * (2R + 1) / 2R] int64; their bounds: [2S+1] int32).
    """
    starts, chunk = cu_seqlens[:-1], cu_seqlens.diff() // (2 * size)
    lengths = _early_and_late((rank + 1) * chunk, (2 * size - rank) * chunk)
    return runs(_early_and_late(starts, starts), lengths), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def own_tokens(values: torch.Tensor, cu_seqlens: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """[T] -> [T/R]: this rank's part of a row."""
    return values if parallel.cp_size == 1 else values[token_positions(cu_seqlens, parallel.cp_rank, parallel.cp_size)]


def own_part(batch: MicroBatch, parallel: ParallelState) -> MicroBatch:
    """This rank's part of a micro-batch: [T/R] tokens, with the bounds that the sequences' parts have among them.

    What is said of whole sequences and groups, like their lengths, stays what it was.
    """
    if parallel.cp_size == 1:
        return batch
    own = token_positions(batch.cu_seqlens, parallel.cp_rank, parallel.cp_size)
    return replace(
        batch,
        input_ids=batch.input_ids[own],
        position_ids=batch.position_ids[own],
        targets=batch.targets[own],
        loss_mask=batch.loss_mask[own],
        advantages=batch.advantages[own],
        rollout_logprobs=batch.rollout_logprobs[own],
        cu_seqlens=batch.cu_seqlens // parallel.cp_size,
    )


def whole_rows(
    parts: Sequence[torch.Tensor], microbatches: Sequence[MicroBatch], parallel: ParallelState
) -> list[torch.Tensor]:
    """[T/R] values of each micro-batch on every rank -> [T] on every rank. One collective over the cp group; no gradient."""
    if parallel.cp_size == 1:
        return list(parts)
    own = torch.cat(list(parts))
    by_rank = [torch.empty_like(own) for _ in range(parallel.cp_size)]
    dist.all_gather(by_rank, own, group=parallel.cp_group)
    lengths = [len(part) for part in parts]
    rows = []
    for batch, *pieces in zip(microbatches, *(values.split(lengths) for values in by_rank), strict=True):
        rows.append(torch.cat(pieces)[_place_in_parts(batch.cu_seqlens.to(own.device), parallel.cp_size)])
    return rows


def whole_row(part: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T/R, ...] on every rank of the cp group -> [T, ...] on every rank.

    Differentiable: the gradient of a token's values is summed over the ranks, and arrives on the one that holds the token.
    """
    # Named for its use along tensor-parallel ranks: all-gather forward, reduce-scatter backward, over any group.
    parts = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
    return parts.index_select(0, _place_in_parts(cu_seqlens, group.size()))


def runs(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N], [N] -> [sum of lengths] int64: starts[0], starts[0] + 1, ... for lengths[0] numbers, then from starts[1], and so on."""
    offsets = lengths.cumsum(0) - lengths
    shifts = torch.repeat_interleave(starts - offsets, lengths)
    return torch.arange(len(shifts), device=shifts.device) + shifts


def _early_and_late(early: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    """[S], [S] -> [2S]: sequence by sequence, the value of the early and of the late chunk that a rank holds."""
    return torch.stack([early, late], dim=1).flatten()


def _place_in_parts(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """[T] int64: where each token of the row is when the ranks' parts are put one behind the other."""
    positions = torch.cat([token_positions(cu_seqlens, rank, size) for rank in range(size)])
    return torch.empty_like(positions).scatter_(0, positions, torch.arange(len(positions), device=positions.device))
