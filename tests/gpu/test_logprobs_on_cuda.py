"""Log-probs and entropy on one GPU, in value, gradient and memory; the bf16 products with fp32 results are only there."""

import math

import pytest
import torch
from torch import Tensor

from megatron_gppo.algorithm import linear_logprobs_and_entropy, vocab_parallel_logprobs_and_entropy
from tests.support.logprob_reference import (
    LogprobCase,
    of_logits,
    over_rounded_logits,
    random_case,
    reference_logprobs,
    relative_error,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FP32_TOLERANCE = 5e-6


def on_cuda(case: LogprobCase) -> tuple[Tensor, Tensor, Tensor]:
    return case.hidden.cuda().requires_grad_(), case.weight.cuda().requires_grad_(), case.targets.cuda()


def backward(case: LogprobCase, logprobs: Tensor, entropy: Tensor) -> None:
    torch.autograd.backward([logprobs, entropy], [case.grad_logprobs.cuda(), case.grad_entropy.cuda()])


@pytest.fixture
def full_precision_matmuls() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize(("num_tokens", "temperature"), [(33, 1.0), (33, 0.6), (1, 0.6)])
def test_fp32_matches_fp64(
    full_precision_matmuls: None, num_tokens: int, temperature: float, with_main_grad: bool
) -> None:
    case = random_case(num_tokens, 48, 9000, 8971)
    hidden, weight, targets = on_cuda(case)
    main_grad = torch.zeros_like(weight) if with_main_grad else None
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden,
        weight,
        targets,
        vocab_size=case.vocab_size,
        temperature=temperature,
        entropy_requires_grad=True,
        main_grad=main_grad,
    )
    backward(case, logprobs, entropy)
    expected = reference_logprobs(case, temperature, True)
    assert relative_error(logprobs.cpu(), expected.logprobs) < FP32_TOLERANCE
    assert relative_error(entropy.cpu(), expected.entropy) < FP32_TOLERANCE
    grad_weight = weight.grad if main_grad is None else main_grad
    assert relative_error(hidden.grad.cpu(), expected.grad_hidden) < FP32_TOLERANCE
    assert relative_error(grad_weight.cpu(), expected.grad_weight) < FP32_TOLERANCE


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_bf16_is_no_worse_than_over_bf16_logits(with_main_grad: bool) -> None:
    case = random_case(64, 128, 9000, 8971, dtype=torch.bfloat16)
    case.weight /= 8
    hidden, weight, targets = on_cuda(case)
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if with_main_grad else None
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden, weight, targets, vocab_size=case.vocab_size, entropy_requires_grad=True, main_grad=main_grad
    )
    backward(case, logprobs, entropy)
    expected = reference_logprobs(case, 1.0, True)
    rounded_logprobs, rounded_entropy = over_rounded_logits(case, 1.0)
    assert relative_error(logprobs.cpu(), expected.logprobs) <= relative_error(rounded_logprobs, expected.logprobs)
    assert relative_error(entropy.cpu(), expected.entropy) <= relative_error(rounded_entropy, expected.entropy)
    grad_weight = weight.grad if main_grad is None else main_grad
    assert relative_error(hidden.grad.cpu(), expected.grad_hidden) < 5e-3
    assert relative_error(grad_weight.cpu(), expected.grad_weight) < 5e-3


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_matches_fp64(dtype: torch.dtype, by_columns: bool) -> None:
    case = random_case(33, 48, 9000, 8971)
    logits = (case.hidden @ case.weight.T).to(dtype)
    if by_columns:  # in memory
        logits = logits.T.contiguous().T
    leaf = logits.cuda().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs_and_entropy(
        leaf, case.targets.cuda(), vocab_size=case.vocab_size, temperature=0.6, entropy_requires_grad=True
    )
    backward(case, logprobs, entropy)
    wide = logits.double().requires_grad_()
    expected, expected_entropy = of_logits(wide[:, : case.vocab_size] / 0.6, case.targets)
    torch.autograd.backward([expected, expected_entropy], [case.grad_logprobs.double(), case.grad_entropy.double()])
    assert relative_error(logprobs.cpu(), expected.detach()) < FP32_TOLERANCE
    assert relative_error(entropy.cpu(), expected_entropy.detach()) < FP32_TOLERANCE
    assert relative_error(leaf.grad.cpu(), wide.grad) < (FP32_TOLERANCE if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype, temperature: float, entropy_requires_grad: bool) -> None:
    """Large equal ones, a difference that overflows e^x, -inf at every other id, and at all."""
    logits = torch.zeros(5, 9000)
    logits[0], logits[1] = 1e5, 1e30
    logits[2, 5], logits[2, 6] = 1e35, -1e35
    logits[3, ::2], logits[4] = -torch.inf, -torch.inf
    leaf = logits.to(dtype).cuda().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs_and_entropy(
        leaf,
        torch.tensor([0, 0, 5, 1, 0]).cuda(),
        temperature=temperature,
        entropy_requires_grad=entropy_requires_grad,
    )
    expected = [math.log(9000), math.log(9000), 0.0, math.log(4500), 0.0]
    assert logprobs.tolist() == pytest.approx([*(-value for value in expected[:4]), -torch.inf], abs=1e-5)
    assert entropy.tolist() == pytest.approx(expected, abs=1e-5)
    (logprobs.sum() + (entropy.sum() if entropy_requires_grad else 0.0)).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_and_all_tokens_masked_give_zero_gradients(dtype: torch.dtype, num_tokens: int) -> None:
    hidden, weight, targets = on_cuda(random_case(num_tokens, 48, 9000, 9000, dtype))
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (num_tokens,)
    torch.where(torch.zeros_like(targets, dtype=torch.bool), logprobs, 0.0).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_a_tenth_of_the_logits(dtype: torch.dtype) -> None:
    tokens, vocab_size, hidden_size = 4096, 151936, 1536
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab_size, hidden_size, device="cuda", dtype=dtype) / 16).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device="cuda")
    linear_logprobs_and_entropy(hidden[:8], weight, targets[:8])[0].sum().backward()  # cuBLAS's workspace
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, _ = linear_logprobs_and_entropy(hidden, weight, targets)
    logprobs.sum().backward()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 0.1 * 4 * tokens * vocab_size
