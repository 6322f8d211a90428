"""How context parallelism cuts a packed row, and that attention over the parts is attention over the row."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gppo.datatypes import MicroBatch, Sample
from megatron_gppo.packing import pack_updates
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy.context_parallel import own_part, own_tokens, token_positions, visible_keys
from megatron_gppo.policy.local_modules import BLOCK_TOKENS, PackedAttention

TOKEN_FIELDS = ("input_ids", "position_ids", "targets", "loss_mask", "advantages", "rollout_logprobs")


def bounds_of(chunks: list[int], size: int) -> torch.Tensor:
    """[S+1]: sequences of 2 * size chunks of these lengths."""
    return torch.tensor([0, *np.cumsum([2 * size * chunk for chunk in chunks])], dtype=torch.int32)


def parallel_state(cp_rank: int, cp_size: int) -> ParallelState:
    return ParallelState(cp_rank, cp_size, 0, 1, 0, 1, 0, 1, None, None, None, None, cp_rank=cp_rank, cp_size=cp_size)


def test_example_of_the_docstring() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert token_positions(cu_seqlens, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert token_positions(cu_seqlens, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), size=st.integers(2, 5))
def test_every_token_is_on_one_rank_and_every_rank_has_the_same_share_of_each_sequence(
    chunks: list[int], size: int
) -> None:
    cu_seqlens = bounds_of(chunks, size)
    by_rank = [token_positions(cu_seqlens, rank, size) for rank in range(size)]
    assert sorted(torch.cat(by_rank).tolist()) == list(range(int(cu_seqlens[-1])))
    for positions in by_rank:
        assert positions.tolist() == sorted(positions.tolist())
        shares = np.histogram(positions, bins=cu_seqlens.numpy())[0]
        assert shares.tolist() == [2 * chunk for chunk in chunks]
    # Causal attention costs a rank its queries' positions in their sequences.
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    assert len({int((positions - starts[positions]).sum()) for positions in by_rank}) == 1


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4), size=st.integers(2, 4))
def test_visible_keys_end_with_the_chunk_that_sees_them(chunks: list[int], size: int) -> None:
    cu_seqlens = bounds_of(chunks, size)
    for rank in range(size):
        positions = token_positions(cu_seqlens, rank, size)
        keys, bounds = visible_keys(cu_seqlens, rank, size)
        queries = positions.split([chunk for chunk in chunks for _ in range(2)])
        assert bounds[-1] == len(keys)
        for number, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
            of_sequence = int(cu_seqlens[number // 2])
            assert keys[start:end].tolist() == list(range(of_sequence, int(queries[number][-1]) + 1))


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[MicroBatch, int]:
    size = draw(st.integers(2, 4))
    lengths = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    samples = [
        Sample(
            i,
            rng.integers(1, 99, p),
            rng.integers(1, 99, n),
            rng.random(n, np.float32) - 2,
            rng.normal(),
            i % 2 == 0,
            False,
        )
        for i, (p, n) in enumerate(lengths)
    ]
    (update,) = pack_updates(
        samples,
        groups_per_update=len(samples),
        dp_rank=0,
        dp_size=1,
        tokens_per_microbatch=10_000,
        alignment=2 * size * draw(st.integers(1, 3)),
        sequence_alignment=2 * size,
    )
    return update.microbatches[0], size


@settings(max_examples=50, deadline=None)
@given(row_and_size=packed_rows())
def test_parts_of_a_micro_batch_stay_aligned_and_add_up_to_it(row_and_size: tuple[MicroBatch, int]) -> None:
    row, size = row_and_size
    parts = [own_part(row, parallel_state(rank, size)) for rank in range(size)]
    positions = torch.cat([token_positions(row.cu_seqlens, rank, size) for rank in range(size)])
    for name in TOKEN_FIELDS:
        whole = torch.empty_like(getattr(row, name))
        whole[positions] = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(row, name)), name
    for rank, part in enumerate(parts):
        assert (part.cu_seqlens * size).tolist() == row.cu_seqlens.tolist()
        assert part.cu_seqlens[-1] == len(part.input_ids)
        assert torch.equal(part.sequence_lengths, row.sequence_lengths)
        # A place within a part belongs to the sequence that the part's bounds say.
        sequence = torch.repeat_interleave(torch.arange(len(row.correct)), row.cu_seqlens.diff())
        own = torch.repeat_interleave(torch.arange(len(row.correct)), part.cu_seqlens.diff())
        assert torch.equal(own, own_tokens(sequence, row.cu_seqlens, parallel_state(rank, size)))


@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_parts_is_attention_over_the_row(size: int) -> None:
    """Several short sequences in a block, and one longer than a block."""
    cu_seqlens = bounds_of([1, 3, 2, BLOCK_TOKENS // (2 * size) + 1, 2], size)
    longest = int(cu_seqlens.diff().max())
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    attention = PackedAttention(TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(int(cu_seqlens[-1]), heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    expected = attention.attend(query, key, value, packed)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad((expected * weight).sum(), (query, key, value))

    positions = torch.cat([token_positions(cu_seqlens, rank, size) for rank in range(size)])
    parts = [
        attention.attend(query[token_positions(cu_seqlens, rank, size)], key, value, packed, rank, size)
        for rank in range(size)
    ]
    torch.testing.assert_close(torch.cat(parts), expected[positions])
    got = torch.autograd.grad((torch.cat(parts) * weight[positions]).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
