"""policy_loss where context parallelism cuts sequences: the ranks' losses and gradients add up to the reference's."""

import pytest
import torch
import torch.distributed as dist

from megatron_gppo.algorithm import policy_loss
from tests.support.distributed import run_ranks
from tests.support.loss_reference import (
    AGGREGATIONS,
    OBJECTIVES,
    TOKEN_FIELDS,
    Batch,
    Sequence,
    loss_config,
    random_batch,
    reference_loss,
)

# One token, none, and enough for every rank; the parts of the short ones are empty on most ranks.
LENGTHS = [6, 1, 0, 13, 2]
CONFIGS = {
    f"{objective}, {aggregation}": loss_config(
        objective, aggregation=aggregation, clip_low=0.05, clip_high=0.05, kl_coef=0.1, entropy_coef=0.01, nll_coef=0.1
    )
    for objective in OBJECTIVES
    for aggregation in AGGREGATIONS
} | {
    f"{objective}, {correction} by {level}": loss_config(
        objective, importance_correction=correction, importance_level=level, importance_cap=1.2
    )
    for objective in ("ce_gppo", "gspo")
    for correction in ("truncated", "masked")
    for level in ("token", "sequence", "geometric")
    # The reference differentiates the sequence's ratio, whose token form is another one where tokens weigh differently.
    if (objective, level) != ("gspo", "token")
}


def whole_batch() -> Batch:
    return random_batch(5, LENGTHS)


def part_of(sequence: Sequence, rank: int, cp_size: int) -> Sequence:
    """This rank's contiguous piece, of uneven sizes."""
    length = len(sequence.logprobs)
    first, last = length * rank // cp_size, length * (rank + 1) // cp_size
    values = {name: getattr(sequence, name)[first:last] for name in TOKEN_FIELDS}
    return Sequence(**values, group=sequence.group, correct=sequence.correct)


def compute_on_rank(rank: int) -> dict[str, tuple[float, list[torch.Tensor]]]:
    """(loss, gradient of the part's log-probs by sequence) under each config."""
    batch = whole_batch()
    parts = Batch([part_of(sequence, rank, dist.get_world_size()) for sequence in batch.sequences])
    results = {}
    for name, config in CONFIGS.items():
        whole, inputs = batch.pack(config), parts.pack(config)
        counts = ["denominator", "sequence_lengths", "group_lengths", "num_correct_tokens"]
        inputs |= {count: whole[count] for count in counts}
        logprobs = inputs["logprobs"].requires_grad_()
        inputs["entropy"].requires_grad_()
        loss = policy_loss(config, **inputs, cp_group=dist.group.WORLD).loss
        loss.backward()
        results[name] = (loss.item(), list(logprobs.grad.split(inputs["cu_seqlens"].diff().tolist())))
    return results


@pytest.mark.parametrize("cp_size", [2, 4])
def test_sequences_cut_over_ranks(cp_size: int) -> None:
    by_rank = run_ranks(cp_size, compute_on_rank)
    batch = whole_batch()
    for name, config in CONFIGS.items():
        expected = reference_loss(config, batch)
        losses, gradients = zip(*(results[name] for results in by_rank), strict=True)
        assert abs(sum(losses) - expected.loss) <= 2e-6 * expected.magnitude, name
        for index, want in enumerate(expected.logprobs):
            got = torch.cat([gradient[index] for gradient in gradients]).double()
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
