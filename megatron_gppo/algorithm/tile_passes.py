"""What is done to every element of a tile of logits beside the matrix products: one pass forward, one backward.

Here for the CPU, in tile_kernels.py for GPUs.

Letters: T tokens, C columns of the tile, x its logits, z = x / temperature, m [T] a number that z is shifted by.

Each operation takes the time that it takes to bring the tile through the memory, and a pass has several. So they are all
applied to a block of rows that stays in the cache, before the next rows are looked at.
"""

import torch
from torch import Tensor

# Two fp32 blocks of it fill half of a second-level cache of 2 MiB.
CPU_BLOCK_ELEMENTS_PER_THREAD = 128 * 1024
# e^-200 is 0 in fp32. Shifted logits stop there where -inf * e^-inf would be NaN.
LOWEST_SHIFTED_LOGIT = -200.0


def sum_tile(logits: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """[3, T] fp32: m = max z, sum e^(z-m), and sum e^(z-m) (z-m), which is 0 without entropy.

    logits: [T, C] fp32 or bf16, not modified.
    """
    if logits.is_cuda:
        from megatron_gppo.algorithm import tile_kernels  # where torch has no GPU, there is no Triton

        return tile_kernels.sum_tile(logits, temperature, with_entropy)
    sums = torch.zeros(3, len(logits), device=logits.device)
    rows = _rows_per_block(logits)
    scratch = torch.empty(1 + with_entropy, rows, logits.shape[1], device=logits.device)
    for block, block_sums in zip(logits.split(rows), sums.split(rows, dim=1), strict=True):
        maximum, exp_sum, weighted_sum = block_sums
        shifted = scratch[0, : len(block)]
        z = _z(block, temperature, shifted)
        # Finite, so that a row of nothing but -inf is not shifted to NaN.
        torch.amax(z, dim=1, out=maximum).clamp_(min=torch.finfo(torch.float32).min)
        torch.sub(z, maximum[:, None], out=shifted)
        if with_entropy:
            exps = torch.exp(shifted, out=scratch[1, : len(block)])
            torch.nansum(shifted.mul_(exps), dim=1, out=weighted_sum)  # -inf * e^-inf counts as 0
        else:
            exps = shifted.exp_()
        torch.sum(exps, dim=1, out=exp_sum)
    return sums


def exponentiate_tile(
    logits: Tensor,
    temperature: float,
    maximum: Tensor,
    factor: Tensor,
    line: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """Writes factor * e^(z-m) * (slope (z-m) + constant) to out.

    Args:
        logits: [T, C] fp32 or bf16.
        maximum: [T] fp32, m.
        factor: [T] fp32.
        line: slope and constant, [T] fp32. None: 0 and 1.
        out: [T, C] fp32 or bf16; may be logits itself.
    """
    if logits.is_cuda:
        from megatron_gppo.algorithm import tile_kernels

        return tile_kernels.exponentiate_tile(logits, temperature, maximum, factor, line, out)
    rows = _rows_per_block(logits)
    scratch = torch.empty(2, rows, logits.shape[1], device=logits.device)
    for first in range(0, len(logits), rows):
        block = slice(first, first + rows)
        result = out[block]
        grad = result if result.dtype == torch.float32 else scratch[0, : len(result)]
        torch.sub(_z(logits[block], temperature, grad), maximum[block, None], out=grad)
        if line is None:
            grad.exp_()
        else:
            slope, constant = line
            exps = torch.exp(grad.clamp_(min=LOWEST_SHIFTED_LOGIT), out=scratch[1, : len(result)])
            grad.mul_(slope[block, None]).add_(constant[block, None]).mul_(exps)
        grad.mul_(factor[block, None])
        if grad is not result:
            result.copy_(grad)


def scaled(logits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """fp32 logits divided by the temperature, rounded alike on every device: CUDA divides by a number in this way anyhow."""
    return torch.mul(logits, 1.0 / temperature, out=out)


def _rows_per_block(logits: Tensor) -> int:
    return max(CPU_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads() // logits.shape[1], 1)


def _z(block: Tensor, temperature: float, scratch: Tensor) -> Tensor:
    """In fp32: in scratch, or the block itself where that is z already."""
    if block.dtype != torch.float32:
        block = scratch.copy_(block)
    return block if temperature == 1.0 else scaled(block, temperature, out=scratch)
