"""The matrix products of the output layer with a tile of the vocabulary, each in the form that is fastest on the device.

Letters: T tokens, H hidden size, C columns of a tile, that is rows of the weight.

bf16 on a CPU has three peculiarities. Without instructions for it, a product takes 10 to 100 times as long as in fp32; so
hidden, and the weight tile by tile, are widened to fp32 there, and nothing is rounded before the gradients are. With them,
there is no product of bf16 matrices with an fp32 result; so logits are rounded to bf16, but less a centre near which the
probable ones lie, which leaves the digits to their differences. And products with a transposed left side take twice the
time; so the weight's gradient is formed as its transpose, from hidden transposed.

Results are written to the same memory tile after tile: new memory costs a CPU a page fault every 4 KiB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_gppo.algorithm.softmax import Centre
from megatron_gppo.algorithm.vocabulary import COLUMNS_PER_TILE, VocabularyShard

CENTRE_SAMPLE = 256  # rows of the weight
TOKENS_AT_ONCE = 256


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 matrices."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def operand_of(hidden: Tensor) -> Tensor:
    """hidden in the dtype in which products are formed: itself, or a copy in fp32."""
    return hidden.float() if _is_bf16_on_cpu(hidden) and not has_bf16_instructions() else hidden


class WeightTiles:
    """Rows of the weight in the dtype in which products are formed."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """weight: [V/TP, H]. dtype: that of operand_of(hidden)."""
        self._weight = weight
        self.memory = None  # of the tile, where it is a copy
        if dtype != weight.dtype:
            self.memory = _memory(weight, weight.shape[1], len(weight), dtype)

    def __call__(self, columns: slice) -> Tensor:
        """[C, H]. Good until the next call."""
        rows = self._weight[columns]
        if self.memory is None:
            return rows
        return _matrix(self.memory, len(rows), rows.shape[1]).copy_(rows)


def centre_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, temperature: float
) -> Centre | None:
    """The mean logit under the softmax over a sample of this rank's columns and the target. hidden: as operand_of gives it.

    None where logits are not rounded: they are for bf16 on a CPU only.
    """
    if not _is_bf16_on_cpu(hidden) or shard.num_columns == 0:
        return None
    place, is_inside = shard.find(targets)
    target_logit = torch.empty(place.shape)
    for some in _slices(len(place)):
        torch.linalg.vecdot(hidden[some].float(), weight[place[some]].float(), out=target_logit[some])
    sample = weight[: shard.num_columns : -(-shard.num_columns // CENTRE_SAMPLE)]
    logits = torch.mm(hidden, sample.t()).float()
    logits = torch.cat([logits, torch.where(is_inside, target_logit, logits[:, 0])[:, None]], dim=1)
    mean = torch.linalg.vecdot((logits / temperature).softmax(dim=1), logits)
    return Centre(mean.bfloat16(), target_logit)


class TileLogits:
    """hidden @ weight.T, a tile at a time."""

    def __init__(self, hidden: Tensor, vocabulary_size: int, centre: Tensor | None) -> None:
        """hidden: [T, H]. centre: [T] bf16, taken off the logits, which then are bf16."""
        self._hidden, self._centre = hidden, centre
        dtype = torch.float32 if centre is None else hidden.dtype
        self._memory = _memory(hidden, len(hidden), vocabulary_size, dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        """[T, C] of these [C, H] rows, fp32 without a centre. Good until the next call."""
        out = _matrix(self._memory, len(self._hidden), len(weight))
        if self._centre is not None:
            return torch.addmm(self._centre[:, None], self._hidden, weight.t(), beta=-1, out=out)
        if self._hidden.dtype == torch.float32:
            return torch.mm(self._hidden, weight.t(), out=out)
        return torch.mm(self._hidden, weight.t(), out_dtype=torch.float32, out=out)


class HiddenGradient:
    """grad @ weight, summed over tiles in fp32.

    The targets are apart. Theirs are the largest gradients, and are fp32 here, so that it matters less that the others
    are rounded to bf16.
    """

    def __init__(self, weight: Tensor, targets: Tensor, of_targets: Tensor, shard: VocabularyShard) -> None:
        """weight: [V/TP, H]. of_targets: [T] fp32 gradients of the targets' logits."""
        self.sum = weight.new_zeros(len(targets), weight.shape[1], dtype=torch.float32)
        self._product: Tensor | None = None
        place, is_inside = shard.find(targets)
        for some in _slices(len(targets)):
            # In their place: of further copies of such sizes the C library's allocator keeps 10 MiB and more.
            rows = self.sum[some].copy_(weight[place[some]])
            rows.mul_(of_targets[some, None]).masked_fill_(~is_inside[some, None], 0.0)

    def add(self, grad: Tensor, weight: Tensor) -> None:
        """grad: [T, C], 0 for the targets. weight: [C, H] of the same dtype."""
        if grad.dtype == torch.float32:
            torch.addmm(self.sum, grad, weight, out=self.sum)
        elif _is_bf16_on_cpu(grad):
            if self._product is None:
                self._product = torch.empty_like(self.sum, dtype=grad.dtype)
            self.sum += torch.mm(grad, weight, out=self._product)
        else:
            self.sum += torch.mm(grad, weight, out_dtype=torch.float32)


class WeightGradient:
    """grad.T @ hidden, tile by tile: written to a new tensor, or added to an fp32 one."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabularyShard,
        main_grad: Tensor | None,
        tile_memory: Tensor | None,
    ) -> None:
        """hidden: [T, H] as operand_of gives it. main_grad: [V/TP, H] fp32 to add to; without it result is the gradient.

        tile_memory: WeightTiles.memory, which add() may write to.
        """
        self._hidden, self._adds = hidden, main_grad is not None
        self.result = None if main_grad is not None else torch.empty_like(weight)
        if self.result is not None:
            self.result[shard.num_columns :] = 0
        self._all_rows = main_grad if self.result is None else self.result
        self._transposed_hidden = hidden.t().contiguous() if _is_bf16_on_cpu(hidden) else None
        self._memory = tile_memory
        if tile_memory is None and _is_bf16_on_cpu(weight):
            self._memory = _memory(hidden, hidden.shape[1], len(weight))

    def add(self, grad: Tensor, columns: slice) -> None:
        """grad: [T, C], hidden's dtype."""
        assert self._all_rows is not None
        rows = self._all_rows[columns]
        if rows.dtype == grad.dtype and self._transposed_hidden is None:
            torch.addmm(
                rows, grad.t(), self._hidden, beta=float(self._adds), out=rows
            )  # beta 0: rows may hold anything
        elif self._adds:
            rows += self._product(grad)
        else:
            rows.copy_(self._product(grad))

    def _product(self, grad: Tensor) -> Tensor:
        """[C, H], where it cannot be formed in its place."""
        if self._memory is None:
            return torch.mm(grad.t(), self._hidden, out_dtype=torch.float32)
        size, columns = self._hidden.shape[1], grad.shape[1]
        if self._transposed_hidden is None:
            return torch.mm(grad.t(), self._hidden, out=_matrix(self._memory, columns, size))
        product = torch.mm(self._transposed_hidden, grad, out=_matrix(self._memory, size, columns)).t()
        # An addition to fp32 that transposes takes ten times as long.
        return product.contiguous() if self._adds else product


def _is_bf16_on_cpu(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def _memory(like: Tensor, size: int, vocabulary_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Enough for any of the tiles, as a _matrix of size times the tile's columns."""
    return like.new_empty(size * min(vocabulary_size, COLUMNS_PER_TILE), dtype=dtype)


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _slices(num_tokens: int) -> Iterator[slice]:
    """Tokens for which [tokens, H] may be copied."""
    for first in range(0, num_tokens, TOKENS_AT_ONCE):
        yield slice(first, first + TOKENS_AT_ONCE)
