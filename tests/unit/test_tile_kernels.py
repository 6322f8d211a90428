"""The GPU's passes over a tile without a GPU: by Triton's interpreter against the CPU's, and compiled for GPUs, not run."""

import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gppo.algorithm import linear_logprobs_and_entropy, softmax, tile_passes
from tests.support.logprob_reference import random_case, reference_logprobs, relative_error

# Where `make test` installs Triton: in the environment itself, Megatron and torch would find it and act as on a GPU.
TRITON = Path(sys.prefix) / "triton"

# Of the logits and of their gradient; the last pair is that of bf16 inputs.
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}

pytestmark = pytest.mark.skipif(
    not TRITON.exists() and find_spec("triton") is None, reason="needs Triton, which `make test` installs"
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which kernels are interpreted."""
    with process_with_triton({"TRITON_INTERPRET": "1"}) as process:
        yield process


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """A process in which kernels can be compiled."""
    with process_with_triton({"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}) as process:
        yield process


@contextmanager
def process_with_triton(environment: dict[str, str]) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=prepare, initargs=(environment,)) as pool:
        yield pool


def prepare(environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.path.insert(0, str(TRITON))
    warnings.simplefilter("ignore")  # numpy's overflows in the interpreter; Triton's about its next version


def tile(num_tokens: int, num_columns: int, dtype: torch.dtype, is_slice: bool) -> Tensor:
    logits = (torch.randn(num_tokens, num_columns + 3) * 5).to(dtype)
    if num_tokens > 3:
        logits[0, 2], logits[1], logits[2, 1:4] = 1e4, -torch.inf, -torch.inf
    return logits[:, 1:-2] if is_slice else logits[:, :num_columns].contiguous()


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_interpreted_kernels_equal_the_passes_of_the_cpu(
    interpreter: Executor, dtype: torch.dtype, out_dtype: torch.dtype, temperature: float, with_entropy: bool
) -> None:
    interpreter.submit(check_passes, dtype, out_dtype, temperature, with_entropy).result()


def check_passes(dtype: torch.dtype, out_dtype: torch.dtype, temperature: float, with_entropy: bool) -> None:
    from megatron_gppo.algorithm import tile_kernels as kernels

    torch.manual_seed(0)
    tolerance = {"rtol": 2e-6 if out_dtype == torch.float32 else 8e-3, "atol": 1e-9}
    for num_tokens, num_columns, is_slice in [(5, 4096, False), (4, 100, True), (1, 1, True), (0, 7, False)]:
        logits = tile(num_tokens, num_columns, dtype, is_slice)
        sums = tile_passes.sum_tile(logits, temperature, with_entropy)
        torch.testing.assert_close(kernels.sum_tile(logits, temperature, with_entropy), sums, rtol=2e-6, atol=1e-6)
        factor, *line = torch.randn(3, num_tokens)
        arguments = logits, temperature, sums[0], factor, tuple(line) if with_entropy else None
        expected = torch.empty(num_tokens, num_columns, dtype=out_dtype)
        tile_passes.exponentiate_tile(*arguments, out=expected)
        wide = torch.zeros(num_tokens, num_columns + 2, dtype=out_dtype)
        kernels.exponentiate_tile(*arguments, out=wide[:, 1:-1])
        torch.testing.assert_close(wide[:, 1:-1], expected, **tolerance)
        assert not wide[:, 0].any()
        assert not wide[:, -1].any()
        if dtype == out_dtype:
            kernels.exponentiate_tile(*arguments, out=logits)
            torch.testing.assert_close(logits, expected, **tolerance)


def test_logprobs_through_interpreted_kernels_match_fp64(interpreter: Executor) -> None:
    interpreter.submit(check_logprobs).result()


def check_logprobs() -> None:
    from megatron_gppo.algorithm import tile_kernels

    softmax.sum_tile, softmax.exponentiate_tile = tile_kernels.sum_tile, tile_kernels.exponentiate_tile
    case = random_case(9, 16, 4500, 4481)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden, weight, case.targets, vocab_size=case.vocab_size, temperature=0.6, entropy_requires_grad=True
    )
    torch.autograd.backward([logprobs, entropy], [case.grad_logprobs, case.grad_entropy])
    expected = reference_logprobs(case, 0.6, True)
    assert relative_error(logprobs, expected.logprobs) < 5e-6
    assert relative_error(entropy, expected.entropy) < 5e-6
    assert relative_error(hidden.grad, expected.grad_hidden) < 5e-6
    assert relative_error(weight.grad, expected.grad_weight) < 5e-6


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_kernels_compile_for_gpus(
    compiler: Executor, architecture: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    compiler.submit(check_compilation, architecture, TYPES[dtype], TYPES[out_dtype]).result()


def check_compilation(architecture: int, dtype: str, out_dtype: str) -> None:
    from megatron_gppo.algorithm import tile_kernels as kernels

    tokens = {"maximum", "factor", "slope", "constant", "sums"}
    of_tile = {"logits": dtype, "out": out_dtype, "inverse_temperature": "fp32"} | dict.fromkeys(tokens, "*fp32")
    for flag in (False, True):
        for kernel, name in ((kernels._sum_row, "WITH_ENTROPY"), (kernels._exponentiate_row, "HAS_LINE")):
            code = compiled(kernel, of_tile, {name: flag, "BLOCK": 4096}, architecture, kernels.LAUNCH_OPTIONS)
            assert code["cubin"]
            assert "ex2.approx" in code["ptx"]
            assert "fma.rn.f32" not in code["ptx"]  # the largest logit less the maximum would not be 0
            assert not re.search(r"muli .*xi32>", code["ttir"])  # a column times its stride may need 64 bits


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The code for an NVIDIA GPU, by the name of each stage of the compilation."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    return dict(compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm)
