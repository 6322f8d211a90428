"""Samples to micro-batches: which sample runs in which forward pass of which data-parallel rank.

Pure and deterministic: every rank calls it with the same samples and keeps its own part of one common division.

Invariants, for every update:
1. Every sample with loss tokens is in exactly one micro-batch of exactly one rank. A sample without any (masked, or
   with an empty response) is in none, since a forward pass over it could change nothing.
2. Every rank has the same number of micro-batches, a multiple of microbatches_multiple_of; it is the smallest into
   which the samples fit, either spread by cost or by first-fit decreasing.
3. No micro-batch has more than tokens_per_microbatch tokens. Each sequence is rounded up to the next multiple of
   sequence_alignment, and their sum to the next multiple of alignment, which is a multiple of sequence_alignment.
   Padding follows its sequence, and the row's follows the last one: causal attention hides it.
4. loss_mask is true exactly where a response token of a sample is predicted, once for each; the counts of UpdateBatch
   are those of the update's samples, whatever the division.
5. A rank that would have too few samples gets fillers: one sequence of alignment tokens, all outside the loss. An
   update without a loss token consists of fillers, and its counts are 0.

Letters as in datatypes.py: L response tokens, P prompt tokens, S sequences, T packed tokens.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from megatron_gppo.datatypes import MicroBatch, Sample, UpdateBatch

# Causal attention costs a sequence of n tokens as much as the rest of a transformer at about n = 12 x hidden size: 18k
# tokens for a 1.5B model, 43k for a 7B one. The division only has to be roughly right, so one number serves them all.
TOKENS_AT_WHICH_ATTENTION_DOUBLES_THE_COST = 24_576


def pack_updates(
    samples: Sequence[Sample],
    *,
    groups_per_update: int,
    dp_rank: int,
    dp_size: int,
    tokens_per_microbatch: int,
    alignment: int,
    sequence_alignment: int = 1,
    microbatches_multiple_of: int = 1,
) -> list[UpdateBatch]:
    """Divides a step's samples into updates, and each update into micro-batches; returns this rank's.

    Groups, in order of first appearance, form updates of groups_per_update; the last update may have fewer, and its
    counts are then its own. Samples are divided over ranks and micro-batches so that their costs are about equal.
    Context-parallel ranks have the same dp_rank, and so the same micro-batches; the policy cuts these where it runs them.

    Raises ValueError for a sample that does not fit into a micro-batch, and for a budget below the alignment.
    """
    assert min(groups_per_update, sequence_alignment, microbatches_multiple_of) >= 1
    assert alignment % sequence_alignment == 0
    assert 0 <= dp_rank < dp_size
    if tokens_per_microbatch < alignment:
        raise ValueError(
            f"train.tokens_per_microbatch = {tokens_per_microbatch} is below the alignment of {alignment} that the layout needs. Fix: raise it"
        )
    capacity = tokens_per_microbatch // alignment * alignment
    members: dict[int, list[int]] = {}  # group -> indices of its samples
    for index, sample in enumerate(samples):
        _check(index, sample, capacity, tokens_per_microbatch, alignment)
        members.setdefault(sample.group, []).append(index)
    groups = list(members.values())
    return [
        _pack_update(
            samples,
            groups[start : start + groups_per_update],
            dp_rank=dp_rank,
            dp_size=dp_size,
            capacity=capacity,
            alignment=alignment,
            sequence_alignment=sequence_alignment,
            microbatches_multiple_of=microbatches_multiple_of,
        )
        for start in range(0, len(groups), groups_per_update)
    ]


def unpack(values: Sequence[torch.Tensor], microbatches: Sequence[MicroBatch]) -> dict[int, np.ndarray]:
    """Cuts packed values, one [T] tensor a micro-batch, into {index of the sample: [L]}, its response tokens' values."""
    unpacked: dict[int, np.ndarray] = {}
    for packed, microbatch in zip(values, microbatches, strict=True):
        if microbatch.sample_indices:
            parts = packed.cpu()[microbatch.loss_mask].split(microbatch.sequence_lengths.tolist())
            unpacked.update(zip(microbatch.sample_indices, (part.numpy() for part in parts), strict=True))
    return unpacked


def _loss_tokens(sample: Sample) -> int:
    return 0 if sample.masked else len(sample.response_ids)


def _check(index: int, sample: Sample, capacity: int, tokens_per_microbatch: int, alignment: int) -> None:
    prompt, response = len(sample.prompt_ids), len(sample.response_ids)
    assert prompt > 0, f"sample {index} has no prompt, so nothing predicts its first token"
    assert len(sample.rollout_logprobs) == response, f"sample {index} lacks the engine's log-probs of some tokens"
    if _loss_tokens(sample) and prompt + response > capacity:
        needed = -(-(prompt + response) // alignment) * alignment
        raise ValueError(
            f"sample {index} (group {sample.group}) has {prompt + response} tokens (prompt {prompt}, response {response}), and "
            f"train.tokens_per_microbatch = {tokens_per_microbatch} holds {capacity} at an alignment of {alignment}. "
            f"Fix: raise it to at least {needed}, or lower data.max_prompt_tokens or rollout.max_response_tokens"
        )


def _pack_update(
    samples: Sequence[Sample],
    groups: list[list[int]],
    *,
    dp_rank: int,
    dp_size: int,
    capacity: int,
    alignment: int,
    sequence_alignment: int,
    microbatches_multiple_of: int,
) -> UpdateBatch:
    group_tokens = {samples[group[0]].group: sum(_loss_tokens(samples[i]) for i in group) for group in groups}
    indices = [i for group in groups for i in group if _loss_tokens(samples[i])]
    lengths = np.array([len(samples[i].prompt_ids) + len(samples[i].response_ids) for i in indices], dtype=np.int64)
    lengths = -(-lengths // sequence_alignment) * sequence_alignment
    division = _divide(lengths, dp_size, capacity, microbatches_multiple_of)
    return UpdateBatch(
        microbatches=[
            _pack_microbatch(samples, [indices[j] for j in members], group_tokens, alignment, sequence_alignment)
            if members
            else _filler(alignment)
            for members in division[dp_rank]
        ],
        num_loss_tokens=sum(group_tokens.values()),
        num_loss_sequences=len(indices),
        num_loss_groups=sum(tokens > 0 for tokens in group_tokens.values()),
        num_correct_tokens=sum(len(samples[i].response_ids) for i in indices if samples[i].correct),
    )


def _divide(lengths: np.ndarray, dp_size: int, capacity: int, multiple_of: int) -> list[list[list[int]]]:
    """Positions in lengths, by rank and micro-batch."""
    costs = lengths * (TOKENS_AT_WHICH_ATTENTION_DOUBLES_THE_COST + lengths)
    bins = _fill_bins(lengths, costs, capacity, dp_size * multiple_of)
    per_rank = len(bins) // dp_size

    bin_costs = [int(costs[members].sum()) for members in bins]
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    rank_costs = [0] * dp_size
    # The most expensive first: it makes the greedy choice a good one, and a shortage of memory shows at once.
    for b in sorted(range(len(bins)), key=lambda b: -bin_costs[b]):
        rank = min((r for r in range(dp_size) if len(ranks[r]) < per_rank), key=lambda r: rank_costs[r])
        ranks[rank].append(sorted(bins[b]))
        rank_costs[rank] += bin_costs[b]
    return ranks


def _fill_bins(lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple_of: int) -> list[list[int]]:
    """Positions in lengths, by bin: as few bins as can be found, of about equal cost; a multiple of multiple_of."""
    longest_first = np.argsort(-lengths, kind="stable")
    first_fit = _first_fit(lengths, longest_first, capacity)
    least = max(1, -(-int(lengths.sum()) // capacity))
    for num_bins in itertools.count(-(-least // multiple_of) * multiple_of, multiple_of):
        bins = _spread(lengths, costs, longest_first, capacity, num_bins)
        if bins is not None:
            return bins
        if len(first_fit) <= num_bins:
            return first_fit + [[] for _ in range(num_bins - len(first_fit))]
    raise AssertionError("unreachable: first-fit's bins are enough")


def _first_fit(lengths: np.ndarray, longest_first: np.ndarray, capacity: int) -> list[list[int]]:
    """First-fit decreasing: few bins of at most capacity tokens."""
    room = np.full(len(lengths), capacity)
    bins: list[list[int]] = [[] for _ in lengths]
    for j in longest_first:
        b = int(np.argmax(room >= lengths[j]))
        room[b] -= lengths[j]
        bins[b].append(int(j))
    return [members for members in bins if members]


def _spread(
    lengths: np.ndarray, costs: np.ndarray, longest_first: np.ndarray, capacity: int, num_bins: int
) -> list[list[int]] | None:
    """Each sample, longest first, to the cheapest bin that has room; None where one finds no room."""
    tokens = np.zeros(num_bins, dtype=np.int64)
    bin_costs = np.zeros(num_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    full = np.iinfo(np.int64).max
    for j in longest_first:
        b = int(np.argmin(np.where(tokens + lengths[j] <= capacity, bin_costs, full)))
        if tokens[b] + lengths[j] > capacity:
            return None
        tokens[b] += lengths[j]
        bin_costs[b] += costs[j]
        bins[b].append(int(j))
    return bins


def _pack_microbatch(
    samples: Sequence[Sample],
    indices: list[int],
    group_tokens: dict[int, int],
    alignment: int,
    sequence_alignment: int,
) -> MicroBatch:
    packed = [samples[i] for i in indices]
    prompt_lengths = np.array([len(sample.prompt_ids) for sample in packed])  # [S]
    response_lengths = np.array([len(sample.response_ids) for sample in packed])  # [S]
    lengths = prompt_lengths + response_lengths  # [S], without padding
    ends = np.cumsum(-(-lengths // sequence_alignment) * sequence_alignment)  # [S]
    num_tokens = int(-(-ends[-1] // alignment) * alignment)  # T
    cu_seqlens = np.append(0, ends).astype(np.int32)  # [S+1]
    cu_seqlens[-1] = num_tokens  # the last sequence takes the row's padding
    starts = cu_seqlens[:-1]

    input_ids = np.zeros(num_tokens, dtype=np.int64)
    input_ids[_runs(starts, lengths)] = np.concatenate(
        [ids for sample in packed for ids in (sample.prompt_ids, sample.response_ids)]
    )
    # The prompt's last token predicts the first of the response.
    loss_positions = _runs(starts + prompt_lengths - 1, response_lengths)  # [number of loss tokens]

    targets = np.zeros(num_tokens, dtype=np.int64)
    targets[loss_positions] = np.concatenate([sample.response_ids for sample in packed])
    loss_mask = np.zeros(num_tokens, dtype=bool)
    loss_mask[loss_positions] = True
    advantages = np.zeros(num_tokens, dtype=np.float32)
    advantages[loss_positions] = np.repeat([sample.advantage for sample in packed], response_lengths)
    rollout_logprobs = np.zeros(num_tokens, dtype=np.float32)
    rollout_logprobs[loss_positions] = np.concatenate([sample.rollout_logprobs for sample in packed])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(num_tokens) - np.repeat(starts, np.diff(cu_seqlens))),
        targets=torch.from_numpy(targets),
        loss_mask=torch.from_numpy(loss_mask),
        advantages=torch.from_numpy(advantages),
        rollout_logprobs=torch.from_numpy(rollout_logprobs),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        sequence_lengths=torch.from_numpy(response_lengths),
        group_lengths=torch.tensor([group_tokens[sample.group] for sample in packed]),
        correct=torch.tensor([sample.correct for sample in packed]),
        sample_indices=indices,
    )


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[S], [S] -> [sum of lengths]: starts[0], starts[0] + 1, ... for lengths[0] numbers, then from starts[1], and so on."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)


def _filler(num_tokens: int) -> MicroBatch:
    """A forward pass that keeps this rank in step with the others and adds nothing."""
    return MicroBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64),
        position_ids=torch.arange(num_tokens),
        targets=torch.zeros(num_tokens, dtype=torch.int64),
        loss_mask=torch.zeros(num_tokens, dtype=torch.bool),
        advantages=torch.zeros(num_tokens),
        rollout_logprobs=torch.zeros(num_tokens),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        sequence_lengths=torch.zeros(1, dtype=torch.int64),
        group_lengths=torch.zeros(1, dtype=torch.int64),
        correct=torch.zeros(1, dtype=torch.bool),
        sample_indices=[],
    )
