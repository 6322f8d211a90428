"""Log-probs and entropy, in value and gradient, against fp64 over whole logits. Tensor parallel: tests/distributed."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_gppo.algorithm import (
    linear_logprobs_and_entropy,
    output_layer,
    tile_passes,
    vocab_parallel_logprobs_and_entropy,
    vocabulary,
)
from tests.support.logprob_reference import LogprobCase, of_logits, random_case, reference_logprobs, relative_error

FP32_TOLERANCE = 5e-6


@pytest.fixture(params=[False, True], ids=["CPU without bf16", "CPU with bf16"])
def bf16_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of forming bf16 products on a CPU, whichever this one would take."""
    monkeypatch.setattr(output_layer, "has_bf16_instructions", lambda: request.param)
    return request.param


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def backward(case: LogprobCase, values: Tensor, entropy: Tensor | None, entropy_requires_grad: bool) -> None:
    total = (values * case.grad_logprobs).sum()
    if entropy_requires_grad:
        total = total + (entropy * case.grad_entropy).sum()
    total.backward()


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "rows", "vocab_size"),
    [(9, 16, 4500, 4481), (1, 3, 7, 7), (13, 5, 2049, 2049), (6, 8, 4096, 2048), (4, 8, 3, 1)],
    ids=["padded, three tiles", "one token", "one column in the last tile", "padding is a whole tile", "one id"],
)
def test_linear_matches_fp64(
    tokens: int, hidden_size: int, rows: int, vocab_size: int, temperature: float, entropy_requires_grad: bool
) -> None:
    case = random_case(tokens, hidden_size, rows, vocab_size)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, entropy = linear_logprobs_and_entropy(
        hidden,
        weight,
        case.targets,
        vocab_size=vocab_size,
        temperature=temperature,
        entropy_requires_grad=entropy_requires_grad,
    )
    assert (values.dtype, entropy.dtype, entropy.requires_grad) == (torch.float32, torch.float32, entropy_requires_grad)
    backward(case, values, entropy, entropy_requires_grad)
    expected = reference_logprobs(case, temperature, entropy_requires_grad)
    if vocab_size == 1:  # certain: all of it is 0, so that no relative error can be asked for
        for zero in (values, entropy, hidden.grad, weight.grad):
            assert zero.abs().max() < 1e-6
        return
    assert relative_error(values, expected.logprobs) < FP32_TOLERANCE
    assert relative_error(entropy, expected.entropy) < FP32_TOLERANCE
    assert relative_error(hidden.grad, expected.grad_hidden) < FP32_TOLERANCE
    assert relative_error(weight.grad, expected.grad_weight) < FP32_TOLERANCE
    assert (weight.grad[vocab_size:] == 0).all()


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_from_logits_equals_linear_and_leaves_them_unmodified(temperature: float, entropy_requires_grad: bool) -> None:
    case = random_case(9, 16, 4500, 4481)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    logits = hidden @ weight.T
    before = logits.detach().clone()
    values, entropy = vocab_parallel_logprobs_and_entropy(
        logits,
        case.targets,
        vocab_size=case.vocab_size,
        temperature=temperature,
        entropy_requires_grad=entropy_requires_grad,
    )
    backward(case, values, entropy, entropy_requires_grad)
    assert torch.equal(logits, before)
    expected = reference_logprobs(case, temperature, entropy_requires_grad)
    assert relative_error(values, expected.logprobs) < FP32_TOLERANCE
    assert relative_error(entropy, expected.entropy) < FP32_TOLERANCE
    assert relative_error(hidden.grad, expected.grad_hidden) < FP32_TOLERANCE
    assert relative_error(weight.grad, expected.grad_weight) < FP32_TOLERANCE


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_from_bf16_logits(num_tokens: int, entropy_requires_grad: bool) -> None:
    """Exact for the logits as they are; their gradient is rounded to bf16 once."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (3 * torch.randn(num_tokens, 4500, generator=generator)).bfloat16().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets = torch.randint(4500, (num_tokens,), generator=generator)
    values, entropy = vocab_parallel_logprobs_and_entropy(logits, targets, entropy_requires_grad=entropy_requires_grad)
    expected, expected_entropy = of_logits(exact, targets)
    assert values.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=FP32_TOLERANCE, atol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=FP32_TOLERANCE, atol=0)
    (values.sum() + (entropy.sum() if entropy_requires_grad else 0.0)).backward()
    (expected.sum() + (expected_entropy.sum() if entropy_requires_grad else 0.0)).backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
def test_bf16_is_no_worse_than_fp32_softmax_over_bf16_logits(
    entropy_requires_grad: bool, bf16_instructions: bool
) -> None:
    case = random_case(64, 128, 4500, 4481, dtype=torch.bfloat16)
    case.weight /= 8
    expected = reference_logprobs(case, 1.0, entropy_requires_grad)

    def errors(values: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor) -> list[float]:
        backward(case, values, entropy, entropy_requires_grad)
        assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
        return [
            relative_error(values, expected.logprobs),
            relative_error(entropy, expected.entropy),
            relative_error(hidden.grad, expected.grad_hidden),
            relative_error(weight.grad, expected.grad_weight),
        ]

    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, entropy = linear_logprobs_and_entropy(
        hidden, weight, case.targets, vocab_size=case.vocab_size, entropy_requires_grad=entropy_requires_grad
    )
    assert values.dtype == entropy.dtype == torch.float32
    ours = errors(values, entropy, hidden, weight)

    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, entropy = of_logits((hidden @ weight[: case.vocab_size].T).float(), case.targets)
    theirs = errors(values, entropy, hidden, weight)
    for our_error, their_error in zip(ours, theirs, strict=True):
        assert our_error <= their_error
    if not bf16_instructions:  # nothing is rounded but the gradients
        assert max(ours[:2]) < FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_added_to(dtype: torch.dtype, bf16_instructions: bool) -> None:
    """Two micro-batches; the weight gets no gradient of its own, and padding rows nothing."""
    cases = [random_case(9, 16, 4500, 4481, dtype, seed) for seed in (0, 1)]
    weight = leaf(cases[0].weight / 4)
    before = torch.randn(weight.shape)
    main_grad = before.clone()
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    for case in cases:
        case.weight = weight.detach()
        values, _ = linear_logprobs_and_entropy(
            leaf(case.hidden), weight, case.targets, vocab_size=case.vocab_size, main_grad=main_grad
        )
        (values * case.grad_logprobs).sum().backward()
        expected += reference_logprobs(case, 1.0, False).grad_weight
    assert weight.grad is None
    assert torch.equal(main_grad[4481:], before[4481:])
    assert relative_error(main_grad - before, expected) < (FP32_TOLERANCE if dtype == torch.float32 else 5e-3)


def test_wrong_main_grad_is_named() -> None:
    with pytest.raises(ValueError, match=r"main_grad is \[10, 4\] torch.bfloat16"):
        linear_logprobs_and_entropy(**GOOD, main_grad=torch.zeros(10, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_give_no_nan(dtype: torch.dtype, temperature: float, bf16_instructions: bool) -> None:
    case = random_case(5, 8, 20, 17, dtype)
    hidden, weight = leaf(case.hidden * 1e4), leaf(case.weight * 1e4)
    values, entropy = linear_logprobs_and_entropy(
        hidden, weight, case.targets, vocab_size=17, temperature=temperature, entropy_requires_grad=True
    )
    backward(case, values, entropy, entropy_requires_grad=True)
    for tensor in (values, entropy, hidden.grad, weight.grad):
        assert tensor.isfinite().all()


def test_no_token() -> None:
    case = random_case(0, 8, 20, 17)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, entropy = linear_logprobs_and_entropy(hidden, weight, case.targets, entropy_requires_grad=True)
    (values.sum() + entropy.sum()).backward()
    assert values.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_all_tokens_masked_gives_zero_gradients() -> None:
    case = random_case(5, 8, 20, 17)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, _ = linear_logprobs_and_entropy(hidden, weight, case.targets, vocab_size=17)
    torch.where(torch.zeros(5, dtype=torch.bool), values, 0.0).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_padding_rows_may_hold_anything() -> None:
    case = random_case(5, 8, 20, 17)
    case.weight[17:] = float("nan")
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    values, entropy = linear_logprobs_and_entropy(
        hidden, weight, case.targets, vocab_size=17, entropy_requires_grad=True
    )
    backward(case, values, entropy, entropy_requires_grad=True)
    for tensor in (values, entropy, hidden.grad, weight.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_extreme_logits_give_no_nan(temperature: float) -> None:
    """-inf at some ids, a first tile of nothing but -inf, a difference that overflows e^x, and one certain token."""
    logits = torch.zeros(4, vocabulary.COLUMNS_PER_TILE + 3)
    logits[0, ::2] = -torch.inf
    logits[1, : vocabulary.COLUMNS_PER_TILE] = -torch.inf
    logits[2, 5], logits[2, 6] = 1e35, -1e35
    logits[3, 7] = 500.0
    targets = torch.tensor([0, vocabulary.COLUMNS_PER_TILE, 5, 8])
    logits.requires_grad_()
    values, entropy = vocab_parallel_logprobs_and_entropy(
        logits, targets, temperature=temperature, entropy_requires_grad=True
    )
    expected_count = (logits.shape[1]) // 2
    assert values.tolist() == pytest.approx([-torch.inf, -torch.tensor(3.0).log().item(), 0.0, -500.0 / temperature])
    assert entropy.tolist() == pytest.approx(
        [torch.tensor(float(expected_count)).log().item(), torch.tensor(3.0).log().item(), 0.0, 0.0]
    )
    (values.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("entropy_requires_grad", [False, True])
def test_a_row_of_nothing_but_minus_infinity(entropy_requires_grad: bool) -> None:
    """Nothing is possible; one such token gets a gradient, and one is masked. NaN stays NaN, and in its row."""
    logits = torch.zeros(4, 4500)
    logits[:2, :4481] = -torch.inf
    logits[2, 5] = torch.nan
    logits.requires_grad_()
    values, entropy = vocab_parallel_logprobs_and_entropy(
        logits, torch.arange(4), vocab_size=4481, temperature=0.6, entropy_requires_grad=entropy_requires_grad
    )
    assert values[:2].tolist() == [-torch.inf, -torch.inf]
    assert entropy[:2].tolist() == [0.0, 0.0]
    assert values.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, False]
    is_trained = torch.tensor([True, False, True, True])
    (values[is_trained].sum() + (entropy[is_trained].sum() if entropy_requires_grad else 0.0)).backward()
    assert logits.grad.isfinite().all(dim=1).tolist() == [True, True, False, True]
    assert not logits.grad[1].any()


def test_products_that_all_overflow_to_minus_infinity() -> None:
    hidden, weight = leaf(torch.full((2, 4), 1e20)), leaf(torch.full((10, 4), -1e20))
    values, entropy = linear_logprobs_and_entropy(hidden, weight, torch.tensor([0, 9]), entropy_requires_grad=True)
    assert values.tolist() == [-torch.inf, -torch.inf]
    assert entropy.tolist() == [0.0, 0.0]
    (values[0] + entropy[0]).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[1].any()


def test_tied_weight_accumulates_both_gradients() -> None:
    """The embedding and the output layer share one parameter; its gradient is the sum of the two uses."""
    case = random_case(6, 8, 20, 20)
    weight = leaf(case.weight)
    tokens = torch.arange(6)
    values, _ = linear_logprobs_and_entropy(weight[tokens] * 2, weight, case.targets)
    values.sum().backward()
    reference = case.weight.double().requires_grad_()
    logprobs_fp64 = (reference[tokens] * 2 @ reference.T).log_softmax(dim=1)
    logprobs_fp64.gather(1, case.targets[:, None]).sum().backward()
    assert relative_error(weight.grad, reference.grad) < FP32_TOLERANCE


def test_only_the_gradients_asked_for() -> None:
    case = random_case(6, 8, 20, 20)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    linear_logprobs_and_entropy(hidden, case.weight, case.targets)[0].sum().backward()
    linear_logprobs_and_entropy(case.hidden, weight, case.targets)[0].sum().backward()
    both = leaf(case.hidden), leaf(case.weight)
    linear_logprobs_and_entropy(*both, case.targets)[0].sum().backward()
    assert torch.equal(hidden.grad, both[0].grad)
    assert torch.equal(weight.grad, both[1].grad)


def test_without_entropy() -> None:
    case = random_case(6, 8, 20, 20)
    values, entropy = linear_logprobs_and_entropy(case.hidden, case.weight, case.targets, with_entropy=False)
    assert entropy is None
    assert torch.equal(values, linear_logprobs_and_entropy(case.hidden, case.weight, case.targets)[0])


class RecordSizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_nothing_the_size_of_the_logits_exists(with_entropy: bool, dtype: torch.dtype, bf16_instructions: bool) -> None:
    """One tile is the largest tensor of forward and backward, and O(T) is kept between the two."""
    tokens, rows = 300, 40_000
    case = random_case(tokens, 4, rows, rows, dtype)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    kept: list[Tensor] = []
    options = {"with_entropy": with_entropy, "entropy_requires_grad": with_entropy}
    with RecordSizes() as record:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            values, entropy = linear_logprobs_and_entropy(hidden, weight, case.targets, **options)
        forward = len(record.sizes)
        torch.autograd.backward(
            [values, entropy] if with_entropy else values, [torch.ones(tokens)] * (1 + with_entropy)
        )
    tile = tokens * vocabulary.COLUMNS_PER_TILE
    assert max(record.sizes[:forward]) == max(record.sizes[forward:]) == tile
    inputs = {hidden.data_ptr(), weight.data_ptr()}
    assert all(x.numel() == tokens for x in kept if x.data_ptr() not in inputs)
    assert len(kept) <= 7 + (dtype == torch.bfloat16 and bf16_instructions)  # the centre


class RecordPeak(TorchDispatchMode):
    """The most bytes that existed after any operation, of what the operations were given or made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((result, args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                del storage
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._storages.values()))
        return result


def test_bf16_without_instructions_takes_one_tile_and_two_hidden_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside inputs and weight's gradient: the logits and weights of a tile, hidden, and the sum of its gradient."""
    monkeypatch.setattr(output_layer, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(tile_passes, "CPU_BLOCK_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(output_layer, "TOKENS_AT_ONCE", 1)
    tokens, hidden_size, rows, columns = 400, 300, 5000, vocabulary.COLUMNS_PER_TILE
    case = random_case(tokens, hidden_size, rows, rows, torch.bfloat16)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    with RecordPeak() as record:
        linear_logprobs_and_entropy(hidden, weight, case.targets)[0].sum().backward()
    working = 4 * (tokens * columns + columns * hidden_size + 2 * tokens * hidden_size)
    assert record.peak <= 1.005 * (hidden.nbytes + 2 * weight.nbytes + working)


GOOD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(10, 4), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 1, 4)}, r"hidden has shape \[3, 1, 4\]"),
        ({"weight": torch.zeros(10)}, r"weight has shape \[10\]"),
        ({"weight": torch.zeros(10, 5)}, "H = 4, weight has H = 5"),
        (
            {"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)},
            "hidden is torch.bfloat16 on cpu, weight is torch.float32",
        ),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float64)}, "hidden is torch.float64"),
        ({"weight": torch.zeros(10, 4, device="meta")}, "weight is torch.float32 on meta"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \[2\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets is torch.int32"),
        ({"targets": torch.tensor([0, 10, 0])}, "targets holds 10, outside the vocabulary of 10"),
        ({"targets": torch.tensor([0, 9, -100])}, "targets holds -100"),
        ({"targets": torch.tensor([0, 8, 0]), "vocab_size": 8}, "targets holds 8, outside the vocabulary of 8"),
        ({"vocab_size": 11}, "vocab_size = 11"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": 1e-39}, "temperature = 1e-39"),  # its reciprocal is infinite in fp32
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"with_entropy": False, "entropy_requires_grad": True}, "entropy_requires_grad = True"),
    ],
)
def test_wrong_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprobs_and_entropy(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(30)}, r"logits has shape \[30\]"),
        ({"logits": torch.zeros(3, 10, dtype=torch.int64)}, "logits is torch.int64"),
        ({"targets": torch.tensor([0, 10, 0])}, "targets holds 10"),
        ({"vocab_size": 11}, "vocab_size = 11"),
    ],
)
def test_wrong_logits_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs_and_entropy(**({"logits": torch.zeros(3, 10), "targets": GOOD["targets"]} | change))
