"""The two passes of tile_passes.py for GPUs, in Triton: a program holds a row of the tile, reads it once, and writes once.

As PyTorch operations each pass is six to eight, launched one by one, each bringing the tile through the memory.
Letters as in tile_passes.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gppo.algorithm.tile_passes import LOWEST_SHIFTED_LOGIT
from megatron_gppo.algorithm.vocabulary import COLUMNS_PER_TILE

LAUNCH_OPTIONS: dict[str, Any] = {
    "num_warps": 8,  # 16 logits a thread at the most, which stay in registers
    # x * inverse_temperature - maximum in one rounding would not be 0 for the largest logit, but what the product's own
    # rounding took from the maximum: of large logits enough for e^ of it to overflow.
    "enable_fp_fusion": False,
}
_LOWEST_SHIFTED: tl.constexpr = tl.constexpr(LOWEST_SHIFTED_LOGIT)
_LOWEST_FINITE: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


def sum_tile(logits: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """See tile_passes.sum_tile."""
    sums = torch.zeros(3, len(logits), device=logits.device)
    _launch(_sum_row, logits, sums, *logits.stride(), *logits.shape, 1.0 / temperature, WITH_ENTROPY=with_entropy)
    return sums


def exponentiate_tile(
    logits: Tensor,
    temperature: float,
    maximum: Tensor,
    factor: Tensor,
    line: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """See tile_passes.exponentiate_tile."""
    slope, constant = (factor, factor) if line is None else (line[0].contiguous(), line[1].contiguous())
    _launch(
        _exponentiate_row,
        logits,
        out,
        maximum.contiguous(),
        factor.contiguous(),
        slope,
        constant,
        *logits.stride(),
        *out.stride(),
        logits.shape[1],
        1.0 / temperature,
        HAS_LINE=line is not None,
    )


def _launch(kernel: Any, logits: Tensor, *arguments: Any, **constants: Any) -> None:
    num_tokens, num_columns = logits.shape
    assert num_columns <= COLUMNS_PER_TILE
    if num_tokens == 0:  # a grid of nothing is an error
        return
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernel[(num_tokens,)](
            logits, *arguments, **constants, BLOCK=triton.next_power_of_2(num_columns), **LAUNCH_OPTIONS
        )


@triton.jit
def _sum_row(  # type: ignore[no-untyped-def]
    logits,
    sums,
    row_stride,
    column_stride,
    num_tokens,
    num_columns,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    row = logits + token * row_stride
    z = tl.load(row + column * column_stride, mask=column < num_columns, other=-float("inf")).to(tl.float32)
    z *= inverse_temperature
    # Finite, so that a row of nothing but -inf is not shifted to NaN.
    maximum = tl.maximum(tl.max(z, axis=0), _LOWEST_FINITE)
    shifted = z - maximum
    exps = tl.exp(shifted)
    tl.store(sums + token, maximum)
    tl.store(sums + num_tokens + token, tl.sum(exps, axis=0))
    if WITH_ENTROPY:
        weighted = tl.where(exps > 0.0, shifted * exps, 0.0)  # -inf * e^-inf counts as 0
        tl.store(sums + 2 * num_tokens + token, tl.sum(weighted, axis=0))


@triton.jit
def _exponentiate_row(  # type: ignore[no-untyped-def]
    logits,
    out,
    maximum,
    factor,
    slope,
    constant,
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    num_columns,
    inverse_temperature,
    HAS_LINE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    is_column = column < num_columns
    z = tl.load(logits + token * row_stride + column * column_stride, mask=is_column, other=0.0).to(tl.float32)
    shifted = z * inverse_temperature - tl.load(maximum + token)
    if HAS_LINE:
        shifted = tl.maximum(shifted, _LOWEST_SHIFTED)
        value = tl.exp(shifted) * (tl.load(slope + token) * shifted + tl.load(constant + token))
    else:
        value = tl.exp(shifted)
    value *= tl.load(factor + token)
    place = out + token * out_row_stride + column * out_column_stride
    tl.store(place, value.to(out.dtype.element_ty), mask=is_column)
