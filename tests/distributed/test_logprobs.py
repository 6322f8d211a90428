"""Log-probs and entropy over tensor-parallel ranks, in value and gradient, against fp64 over the whole vocabulary."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_gppo.algorithm import linear_logprobs_and_entropy, output_layer, vocab_parallel_logprobs_and_entropy
from tests.support.distributed import run_ranks
from tests.support.logprob_reference import (
    LogprobCase,
    LogprobResult,
    over_rounded_logits,
    random_case,
    reference_logprobs,
    relative_error,
)


@dataclass(frozen=True)
class Setting:
    tokens: int
    rows_per_rank: int
    num_padding: int = 0
    sequence_parallel: bool = False
    temperature: float = 1.0
    entropy_requires_grad: bool = True
    dtype: torch.dtype = torch.float32
    from_logits: bool = False
    targets_at_edges: bool = False
    bf16_instructions: bool = False

    def case(self, tp_size: int) -> LogprobCase:
        rows = self.rows_per_rank * tp_size
        vocab_size = rows - self.num_padding
        case = random_case(self.tokens, 16, rows, vocab_size, self.dtype)
        if self.targets_at_edges:
            edges = [
                edge for r in range(tp_size) for edge in (r * self.rows_per_rank, (r + 1) * self.rows_per_rank - 1)
            ]
            edges.append(vocab_size - 1)
            case.targets = torch.tensor([min(edge, vocab_size - 1) for edge in edges])[
                torch.arange(self.tokens) % len(edges)
            ]
        return case


SETTINGS = {
    "plain": Setting(9, 11),
    "temperature": Setting(9, 11, temperature=0.6),
    "entropy without gradient": Setting(9, 11, entropy_requires_grad=False),
    "one token": Setting(1, 11),
    "no token": Setting(0, 11),
    "several tiles on a rank": Setting(9, 4100, num_padding=3),
    "the last rank has only padding": Setting(9, 5, num_padding=6),
    "targets at shard edges": Setting(18, 7, num_padding=2, targets_at_edges=True),
    "sequence parallel": Setting(12, 11, num_padding=3, sequence_parallel=True),
    "sequence parallel, no token": Setting(0, 11, sequence_parallel=True),
    "bf16": Setting(9, 11, dtype=torch.bfloat16),
    "bf16, sequence parallel": Setting(12, 11, dtype=torch.bfloat16, sequence_parallel=True),
    "bf16 instructions": Setting(9, 11, dtype=torch.bfloat16, bf16_instructions=True),
    "bf16 instructions, sequence parallel": Setting(
        12, 11, dtype=torch.bfloat16, sequence_parallel=True, bf16_instructions=True
    ),
    "from logits": Setting(18, 2060, num_padding=3, temperature=0.6, from_logits=True, targets_at_edges=True),
    "from logits, only padding": Setting(9, 5, num_padding=6, from_logits=True),
}


def compute_on_rank(rank: int) -> dict[str, LogprobResult]:
    """Each setting's results on this rank: hidden's gradient is the rank's share when sequence_parallel."""
    results = {}
    for name, setting in SETTINGS.items():
        with patch.object(output_layer, "has_bf16_instructions", lambda has=setting.bf16_instructions: has):
            results[name] = compute(setting, dist.group.WORLD)
    return results


def compute(setting: Setting, tp_group: dist.ProcessGroup) -> LogprobResult:
    tp_rank, tp_size = tp_group.rank(), tp_group.size()
    case = setting.case(tp_size)
    hidden = case.hidden.chunk(tp_size)[tp_rank] if setting.sequence_parallel and setting.tokens else case.hidden
    hidden = hidden.clone().requires_grad_()
    weight = case.weight.split(setting.rows_per_rank)[tp_rank].clone().requires_grad_()
    options = {
        "vocab_size": case.vocab_size,
        "tp_group": tp_group,
        "temperature": setting.temperature,
        "entropy_requires_grad": setting.entropy_requires_grad,
    }
    if setting.from_logits:
        logprobs, entropy = vocab_parallel_logprobs_and_entropy(hidden @ weight.T, case.targets, **options)
    else:
        logprobs, entropy = linear_logprobs_and_entropy(
            hidden, weight, case.targets, sequence_parallel=setting.sequence_parallel, **options
        )
    total = (logprobs * case.grad_logprobs).sum()
    if setting.entropy_requires_grad:
        total = total + (entropy * case.grad_entropy).sum()
    total.backward()
    if setting.from_logits:  # this matmul is the caller's, and so is the sum over its ranks
        dist.all_reduce(hidden.grad)
    return LogprobResult(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def assert_matches(setting: Setting, actual: LogprobResult, tp_size: int) -> None:
    """5e-6 in fp32; in bf16 no worse than an fp32 softmax over bf16 logits, and gradients as their dtype rounds them."""
    case = setting.case(tp_size)
    expected = reference_logprobs(case, setting.temperature, setting.entropy_requires_grad)
    tolerances = dict.fromkeys(("logprobs", "entropy", "grad_hidden", "grad_weight"), 5e-6)
    if setting.dtype == torch.bfloat16:
        rounded = over_rounded_logits(case, setting.temperature)
        tolerances = {
            "logprobs": relative_error(rounded[0], expected.logprobs),
            "entropy": relative_error(rounded[1], expected.entropy),
            "grad_hidden": 5e-3,
            "grad_weight": 5e-3,
        }
    for name, tolerance in tolerances.items():
        got, want = getattr(actual, name), getattr(expected, name)
        assert got.shape == want.shape
        assert got.isfinite().all()
        assert setting.tokens == 0 or relative_error(got, want) < tolerance, name


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel_matches_fp64(tp_size: int) -> None:
    by_rank = run_ranks(tp_size, compute_on_rank)
    for name, setting in SETTINGS.items():
        results = [results[name] for results in by_rank]
        for other in results[1:]:
            assert torch.equal(other.logprobs, results[0].logprobs), name
            assert torch.equal(other.entropy, results[0].entropy), name
            assert setting.sequence_parallel or torch.equal(other.grad_hidden, results[0].grad_hidden), name
        whole = LogprobResult(
            results[0].logprobs,
            results[0].entropy,
            torch.cat([result.grad_hidden for result in results])
            if setting.sequence_parallel
            else results[0].grad_hidden,
            torch.cat([result.grad_weight for result in results]),
        )
        assert_matches(setting, whole, tp_size)


def compute_in_groups_of_one(rank: int) -> LogprobResult:
    groups = [dist.new_group([member]) for member in range(dist.get_world_size())]
    return compute(SETTINGS["sequence parallel"], groups[rank])


def test_group_of_one_rank_is_no_group() -> None:
    for result in run_ranks(2, compute_in_groups_of_one):
        assert_matches(SETTINGS["sequence parallel"], result, tp_size=1)


def raise_on_rank(rank: int) -> str:
    """What a target outside the vocabulary says: the same on every rank, so that none waits for another."""
    try:
        linear_logprobs_and_entropy(
            torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([3, 9]), vocab_size=9, tp_group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    return ""


def test_target_in_the_padding_raises_on_every_rank() -> None:
    first, second = run_ranks(2, raise_on_rank)
    assert first == second
    assert "targets holds 9, outside the vocabulary of 9" in first
