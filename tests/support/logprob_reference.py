"""Log-probs and entropy in fp64 from whole logits, with gradients by autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LogprobCase:
    """Inputs for the whole vocabulary, padding rows included, and the gradients that reach log-probs and entropy."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    vocab_size: int
    grad_logprobs: Tensor  # [T]
    grad_entropy: Tensor  # [T]


@dataclass
class LogprobResult:
    logprobs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def random_case(
    tokens: int, hidden_size: int, rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LogprobCase:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return LogprobCase(
        hidden=normal(tokens, hidden_size).to(dtype),
        weight=normal(rows, hidden_size).to(dtype),
        targets=torch.randint(vocab_size, (tokens,), generator=generator),
        vocab_size=vocab_size,
        grad_logprobs=normal(tokens),
        grad_entropy=normal(tokens),
    )


def reference_logprobs(case: LogprobCase, temperature: float, entropy_requires_grad: bool) -> LogprobResult:
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    logprobs, entropy = of_logits(hidden @ weight[: case.vocab_size].T / temperature, case.targets)
    total = (logprobs * case.grad_logprobs).sum()
    if entropy_requires_grad:
        total = total + (entropy * case.grad_entropy).sum()
    total.backward()
    return LogprobResult(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def over_rounded_logits(case: LogprobCase, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by an fp32 softmax over logits in the inputs' dtype: what bf16 may not be worse than."""
    return of_logits((case.hidden @ case.weight[: case.vocab_size].T).float() / temperature, case.targets)


def of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy in the dtype of the logits, [T, V]."""
    all_logprobs = logits.log_softmax(dim=1)
    return all_logprobs.gather(1, targets[:, None])[:, 0], -(all_logprobs.exp() * all_logprobs).sum(dim=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖"""
    return ((actual.double() - expected).norm() / expected.norm()).item()
