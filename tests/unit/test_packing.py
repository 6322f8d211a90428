"""The invariants in packing's docstring, on random samples, and the worked example of datatypes.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.datatypes import MicroBatch, Sample, UpdateBatch
from megatron_gppo.packing import TOKENS_AT_WHICH_ATTENTION_DOUBLES_THE_COST, pack_updates, unpack

LONGEST = 24  # tokens of a random sample


def make_sample(
    group: int, prompt: int, response: int, *, seed: int = 0, correct: bool = False, masked: bool = False
) -> Sample:
    rng = np.random.default_rng([seed, prompt, response])
    return Sample(
        group=group,
        prompt_ids=rng.integers(1, 1000, prompt),
        response_ids=rng.integers(1, 1000, response),
        rollout_logprobs=-rng.random(response, dtype=np.float32) - 0.01,
        advantage=float(rng.normal()),
        correct=correct,
        masked=masked,
    )


@st.composite
def random_samples(draw: st.DrawFn) -> list[Sample]:
    shapes = draw(
        st.lists(
            st.tuples(
                st.integers(0, 6), st.integers(1, 8), st.integers(0, LONGEST - 8), st.booleans(), st.integers(0, 4)
            ),
            max_size=40,
        )
    )
    return [
        make_sample(group, prompt, response, seed=i, correct=correct, masked=masked == 0)
        for i, (group, prompt, response, correct, masked) in enumerate(shapes)
    ]


def pack_all_ranks(samples: list[Sample], dp_size: int, **layout: int) -> list[list[UpdateBatch]]:
    """By update and rank."""
    by_rank = [pack_updates(samples, dp_rank=rank, dp_size=dp_size, **layout) for rank in range(dp_size)]
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def loss_tokens(sample: Sample) -> int:
    return 0 if sample.masked else len(sample.response_ids)


layouts = st.fixed_dictionaries(
    {
        "groups_per_update": st.integers(1, 4),
        "tokens_per_microbatch": st.integers(LONGEST + 8, 100),
        "alignment": st.sampled_from([1, 2, 8]),
        "sequence_alignment": st.sampled_from([1, 2]),
        "microbatches_multiple_of": st.sampled_from([1, 2, 3]),
    }
).map(lambda layout: {**layout, "alignment": layout["alignment"] * layout["sequence_alignment"]})


@settings(max_examples=150, deadline=None)
@given(samples=random_samples(), dp_size=st.integers(1, 5), layout=layouts)
def test_invariants(samples: list[Sample], dp_size: int, layout: dict[str, int]) -> None:
    updates = pack_all_ranks(samples, dp_size, **layout)

    groups = list(dict.fromkeys(sample.group for sample in samples))
    size = layout["groups_per_update"]
    assert len(updates) == -(-len(groups) // size)
    for number, ranks in enumerate(updates):
        of_update = groups[number * size : (number + 1) * size]
        members = [i for i, sample in enumerate(samples) if sample.group in of_update]
        check_counts(ranks, [samples[i] for i in members])
        trained = [samples[i] for i in members if loss_tokens(samples[i])]
        lengths = [round_up(len(s.prompt_ids) + len(s.response_ids), layout["sequence_alignment"]) for s in trained]
        check_microbatches(ranks, lengths, layout)
        packed = [i for rank in ranks for microbatch in rank.microbatches for i in microbatch.sample_indices]
        assert sorted(packed) == [i for i in members if loss_tokens(samples[i])]
        for rank in ranks:
            for microbatch in rank.microbatches:
                check_contents(microbatch, samples, layout["alignment"], layout["sequence_alignment"])


def check_counts(ranks: list[UpdateBatch], samples: list[Sample]) -> None:
    tokens = [loss_tokens(sample) for sample in samples]
    for rank in ranks:
        assert rank.num_loss_tokens == sum(tokens)
        assert rank.num_loss_sequences == sum(n > 0 for n in tokens)
        assert rank.num_loss_groups == len({s.group for s, n in zip(samples, tokens, strict=True) if n})
        assert rank.num_correct_tokens == sum(n for s, n in zip(samples, tokens, strict=True) if s.correct)
    in_masks = sum(int(microbatch.loss_mask.sum()) for rank in ranks for microbatch in rank.microbatches)
    assert in_masks == sum(tokens)
    in_sequences = sum(int(microbatch.sequence_lengths.sum()) for rank in ranks for microbatch in rank.microbatches)
    assert in_sequences == sum(tokens)


def check_microbatches(ranks: list[UpdateBatch], lengths: list[int], layout: dict[str, int]) -> None:
    number = len(ranks[0].microbatches)
    multiple = layout["microbatches_multiple_of"]
    assert all(len(rank.microbatches) == number for rank in ranks)
    assert number >= multiple
    assert number % multiple == 0
    for rank in ranks:
        for microbatch in rank.microbatches:
            assert len(microbatch.input_ids) <= layout["tokens_per_microbatch"]
            assert len(microbatch.input_ids) % layout["alignment"] == 0
    capacity = layout["tokens_per_microbatch"] // layout["alignment"] * layout["alignment"]
    enough = -(-max(1, first_fit_decreasing(lengths, capacity)) // (len(ranks) * multiple)) * multiple
    assert number <= enough


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = next((b for b, used in enumerate(bins) if used + length <= capacity), None)
        if fitting is None:
            bins.append(length)
        else:
            bins[fitting] += length
    return len(bins)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_contents(microbatch: MicroBatch, samples: list[Sample], alignment: int, sequence_alignment: int) -> None:
    num_tokens = len(microbatch.input_ids)
    assert {f.dtype for f in (microbatch.input_ids, microbatch.position_ids, microbatch.targets)} == {torch.int64}
    assert (microbatch.loss_mask.dtype, microbatch.correct.dtype) == (torch.bool, torch.bool)
    assert (microbatch.advantages.dtype, microbatch.rollout_logprobs.dtype) == (torch.float32, torch.float32)
    assert microbatch.cu_seqlens.dtype == torch.int32
    assert (microbatch.sequence_lengths.dtype, microbatch.group_lengths.dtype) == (torch.int64, torch.int64)
    bounds = microbatch.cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, num_tokens)

    expected = {
        name: [] for name in ("input_ids", "position_ids", "targets", "loss_mask", "advantages", "rollout_logprobs")
    }
    for sequence, index in enumerate(microbatch.sample_indices):
        sample, (start, end) = samples[index], bounds[sequence : sequence + 2]
        ids = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
        padding = end - start - len(ids)
        assert start % sequence_alignment == end % sequence_alignment == 0
        if end < num_tokens:
            assert 0 <= padding < sequence_alignment
        else:
            assert end == round_up(start + round_up(len(ids), sequence_alignment), alignment)
        before, after = len(sample.prompt_ids) - 1, 1 + padding
        tokens = len(sample.response_ids)
        expected["input_ids"] += ids + [0] * padding
        expected["position_ids"] += range(end - start)
        expected["targets"] += [0] * before + sample.response_ids.tolist() + [0] * after
        expected["loss_mask"] += [False] * before + [True] * tokens + [False] * after
        expected["advantages"] += [0.0] * before + [np.float32(sample.advantage).item()] * tokens + [0.0] * after
        expected["rollout_logprobs"] += [0.0] * before + sample.rollout_logprobs.tolist() + [0.0] * after
        assert microbatch.sequence_lengths[sequence] == tokens
        assert microbatch.group_lengths[sequence] == sum(loss_tokens(s) for s in samples if s.group == sample.group)
        assert microbatch.correct[sequence] == sample.correct
    if microbatch.sample_indices:
        assert {name: getattr(microbatch, name).tolist() for name in expected} == expected
        assert len(bounds) == len(microbatch.sample_indices) + 1
    else:
        assert bounds == [0, alignment]
        assert not microbatch.loss_mask.any()
        assert microbatch.sequence_lengths.tolist() == [0]


def test_worked_example_of_datatypes() -> None:
    sample = Sample(
        0, np.array([5, 14, 6, 13]), np.array([8, 1]), np.array([-0.5, -0.25], np.float32), 2.0, True, False
    )
    (update,) = pack_updates([sample], groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=8, alignment=8)
    (microbatch,) = update.microbatches
    assert microbatch.input_ids.tolist() == [5, 14, 6, 13, 8, 1, 0, 0]
    assert microbatch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert microbatch.targets.tolist() == [0, 0, 0, 8, 1, 0, 0, 0]
    assert microbatch.loss_mask.tolist() == [False, False, False, True, True, False, False, False]
    assert microbatch.advantages.tolist() == [0, 0, 0, 2, 2, 0, 0, 0]
    assert microbatch.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25, 0, 0, 0]
    assert microbatch.cu_seqlens.tolist() == [0, 8]
    assert (update.num_loss_tokens, update.num_correct_tokens) == (2, 2)


def test_groups_form_updates_in_order_of_appearance_and_the_last_may_be_short() -> None:
    samples = [make_sample(group, 4, 4, seed=i) for i, group in enumerate([7, 7, 2, 9, 2, 5, 1])]
    updates = pack_updates(samples, groups_per_update=2, dp_rank=0, dp_size=1, tokens_per_microbatch=64, alignment=1)
    packed = [sorted(i for m in update.microbatches for i in m.sample_indices) for update in updates]
    assert packed == [[0, 1, 2, 4], [3, 5], [6]]
    assert [update.num_loss_groups for update in updates] == [2, 2, 1]
    assert [update.num_loss_tokens for update in updates] == [16, 8, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 400), min_size=32, max_size=200), st.integers(2, 8))
def test_cost_is_balanced_over_ranks(lengths: list[int], dp_size: int) -> None:
    samples = [make_sample(0, 1, length - 1, seed=i) for i, length in enumerate(lengths)]
    (ranks,) = pack_all_ranks(samples, dp_size, groups_per_update=1, tokens_per_microbatch=200 * 400, alignment=1)

    def cost(length: int) -> int:
        return length * (TOKENS_AT_WHICH_ATTENTION_DOUBLES_THE_COST + length)

    costs = [sum(cost(lengths[i]) for m in rank.microbatches for i in m.sample_indices) for rank in ranks]
    assert max(costs) - min(costs) <= cost(max(lengths))


def test_long_sequences_count_more_than_their_tokens() -> None:
    # Balanced by tokens, the rank with the long sequence would get 4 of the 12 short ones.
    samples = [make_sample(0, 1, 32_767)] + [make_sample(0, 1, 8_191, seed=i) for i in range(12)]
    (ranks,) = pack_all_ranks(samples, 2, groups_per_update=1, tokens_per_microbatch=131_072, alignment=1)
    with_long = next(rank for rank in ranks if any(0 in m.sample_indices for m in rank.microbatches))
    assert sum(len(m.sample_indices) for m in with_long.microbatches) - 1 == 3


def test_as_few_microbatches_as_fit() -> None:
    samples = [make_sample(0, 1, n - 1, seed=i) for i, n in enumerate([5, 5, 4, 4, 3, 3])]
    (update,) = pack_updates(samples, groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=12, alignment=1)
    assert [len(m.input_ids) for m in update.microbatches] == [12, 12]


def test_samples_that_fit_only_by_first_fit() -> None:
    # Spread by cost, 7+2 and 6+3 leave no room for the last 2; first-fit decreasing finds 7+3 and 6+2+2.
    samples = [make_sample(0, 1, n - 1, seed=i) for i, n in enumerate([7, 6, 3, 2, 2])]
    (update,) = pack_updates(samples, groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=10, alignment=1)
    assert sorted(len(m.input_ids) for m in update.microbatches) == [10, 10]


def test_microbatches_of_an_interleaved_pipeline() -> None:
    samples = [make_sample(0, 4, 4, seed=i) for i in range(5)]
    layout = {"groups_per_update": 1, "tokens_per_microbatch": 8, "alignment": 8, "microbatches_multiple_of": 4}
    (ranks,) = pack_all_ranks(samples, 2, **layout)
    assert [len(rank.microbatches) for rank in ranks] == [4, 4]
    assert sum(not m.sample_indices for rank in ranks for m in rank.microbatches) == 3


def test_rank_without_samples_gets_a_filler() -> None:
    (ranks,) = pack_all_ranks([make_sample(0, 3, 3)], 2, groups_per_update=1, tokens_per_microbatch=64, alignment=4)
    real, filler = (
        rank.microbatches[0] for rank in sorted(ranks, key=lambda rank: not rank.microbatches[0].sample_indices)
    )
    assert real.sample_indices == [0]
    assert filler.sample_indices == []
    assert filler.cu_seqlens.tolist() == [0, 4]
    assert filler.position_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("nothing", [{"masked": True}, {"response": 0}], ids=["masked", "empty response"])
def test_samples_without_loss_tokens_take_part_in_nothing(nothing: dict[str, int]) -> None:
    samples = [make_sample(0, **{"prompt": 3, "response": 4, "correct": True, **nothing}), make_sample(0, 3, 5, seed=1)]
    (update,) = pack_updates(samples, groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=64, alignment=1)
    (microbatch,) = update.microbatches
    assert microbatch.sample_indices == [1]
    assert microbatch.group_lengths.tolist() == [5]
    assert (update.num_loss_tokens, update.num_loss_sequences, update.num_loss_groups) == (5, 1, 1)
    assert update.num_correct_tokens == 0


def test_update_without_loss_tokens_is_all_filler() -> None:
    samples = [make_sample(0, 3, 4, masked=True), make_sample(1, 3, 0)]
    (ranks,) = pack_all_ranks(samples, 2, groups_per_update=2, tokens_per_microbatch=64, alignment=2)
    for rank in ranks:
        assert [m.sample_indices for m in rank.microbatches] == [[]]
        assert (rank.num_loss_tokens, rank.num_loss_sequences, rank.num_loss_groups, rank.num_correct_tokens) == (
            0,
            0,
            0,
            0,
        )


def test_no_samples_no_updates() -> None:
    assert pack_updates([], groups_per_update=1, dp_rank=0, dp_size=2, tokens_per_microbatch=8, alignment=1) == []


def test_sample_longer_than_the_budget() -> None:
    samples = [make_sample(0, 3, 4), make_sample(3, 20, 14)]
    with pytest.raises(ValueError, match="sample 1") as error:
        pack_updates(samples, groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=35, alignment=8)
    message = str(error.value)
    assert "sample 1 (group 3) has 34 tokens" in message
    assert "train.tokens_per_microbatch = 35 holds 32" in message
    assert "raise it to at least 40" in message


def test_budget_below_the_alignment() -> None:
    with pytest.raises(ValueError, match="tokens_per_microbatch = 4 is below the alignment of 8"):
        pack_updates([], groups_per_update=1, dp_rank=0, dp_size=1, tokens_per_microbatch=4, alignment=8)


@settings(max_examples=50, deadline=None)
@given(samples=random_samples(), layout=layouts)
def test_unpack_returns_each_samples_values(samples: list[Sample], layout: dict[str, int]) -> None:
    updates = pack_all_ranks(samples, 2, **layout)
    microbatches = [m for ranks in updates for rank in ranks for m in rank.microbatches]
    unpacked = unpack([m.rollout_logprobs for m in microbatches], microbatches)
    assert sorted(unpacked) == [i for i, sample in enumerate(samples) if loss_tokens(sample)]
    for index, values in unpacked.items():
        np.testing.assert_array_equal(values, samples[index].rollout_logprobs)
