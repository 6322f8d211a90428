"""The matrix products of the output layer with a tile of the vocabulary, each in the form that is fastest on the device.

Letters: T tokens, H hidden size, C columns of a tile, that is rows of the weight.

bf16 on a CPU has two peculiarities. There is no product of bf16 matrices with an fp32 result; so logits are rounded to
bf16, but less a centre near which the probable ones lie, which leaves the digits to their differences. And products with
a transposed left side take twice the time; so the weight's gradient is formed as its transpose, from hidden transposed.

Results are written to the same memory tile after tile: new memory costs a CPU a page fault every 4 KiB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_gppo.algorithm.softmax import Centre
from megatron_gppo.algorithm.vocabulary import COLUMNS_PER_TILE, VocabularyShard

CENTRE_SAMPLE = 256  # rows of the weight
TOKENS_AT_ONCE = 256


def centre_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, temperature: float
) -> Centre | None:
    """The mean logit under the softmax over a sample of this rank's columns and the target.

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

    def __init__(self, hidden: Tensor, weight: Tensor, centre: Tensor | None) -> None:
        """hidden: [T, H]. weight: [V/TP, H]. centre: [T] bf16, taken off the logits, which then are bf16."""
        self._hidden, self._weight, self._centre = hidden, weight, centre
        self._memory = _memory(hidden, len(hidden), len(weight))

    def __call__(self, columns: slice) -> Tensor:
        """[T, C] fp32 without a centre. Good until the next call."""
        weight = self._weight[columns].t()
        out = _matrix(self._memory, len(self._hidden), weight.shape[1])
        if self._centre is not None:
            return torch.addmm(self._centre[:, None], self._hidden, weight, beta=-1, out=out)
        if out.dtype == torch.float32:
            return torch.mm(self._hidden, weight, out=out)
        return torch.mm(self._hidden, weight, out_dtype=torch.float32)


class HiddenGradient:
    """grad @ weight, summed over tiles in fp32.

    The targets are apart. Theirs are the largest gradients, and are fp32 here, so that it matters less that the others
    are rounded to bf16.
    """

    def __init__(self, weight: Tensor, targets: Tensor, of_targets: Tensor, shard: VocabularyShard) -> None:
        """weight: [V/TP, H]. of_targets: [T] fp32 gradients of the targets' logits."""
        self._weight = weight
        self.sum = weight.new_zeros(len(targets), weight.shape[1], dtype=torch.float32)
        self._product = torch.empty_like(self.sum, dtype=weight.dtype) if _is_bf16_on_cpu(weight) else None
        place, is_inside = shard.find(targets)
        for some in _slices(len(targets)):
            rows = weight[place[some]] * of_targets[some, None]
            self.sum[some] = torch.where(is_inside[some, None], rows, 0.0)

    def add(self, grad: Tensor, columns: slice) -> None:
        """grad: [T, C], the weight's dtype, 0 for the targets."""
        weight = self._weight[columns]
        if grad.dtype == torch.float32:
            torch.addmm(self.sum, grad, weight, out=self.sum)
        elif self._product is not None:
            self.sum += torch.mm(grad, weight, out=self._product)
        else:
            self.sum += torch.mm(grad, weight, out_dtype=torch.float32)


class WeightGradient:
    """grad.T @ hidden, tile by tile: written to a new tensor, or added to an fp32 one."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabularyShard, main_grad: Tensor | None) -> None:
        """hidden: [T, H]. main_grad: [V/TP, H] fp32 to add to; without it the gradient is in result."""
        self._hidden, self._adds = hidden, main_grad is not None
        self.result = None if main_grad is not None else torch.empty_like(weight)
        if self.result is not None:
            self.result[shard.num_columns :] = 0
        self._all_rows = main_grad if self.result is None else self.result
        self._transposed_hidden = None
        if _is_bf16_on_cpu(hidden):
            self._transposed_hidden = hidden.t().contiguous()
            self._memory = _memory(hidden, hidden.shape[1], len(weight))

    def add(self, grad: Tensor, columns: slice) -> None:
        """grad: [T, C], hidden's dtype."""
        assert self._all_rows is not None
        rows = self._all_rows[columns]
        if self._transposed_hidden is not None:
            product = _matrix(self._memory, len(self._transposed_hidden), grad.shape[1])
            product = torch.mm(self._transposed_hidden, grad, out=product).t()
            if self._adds:
                rows += product.contiguous()  # an addition to fp32 that transposes takes ten times as long
            else:
                rows.copy_(product)
        elif not self._adds:
            torch.mm(grad.t(), self._hidden, out=rows)
        elif grad.dtype == torch.float32:
            torch.addmm(rows, grad.t(), self._hidden, out=rows)
        else:
            rows += torch.mm(grad.t(), self._hidden, out_dtype=torch.float32)


def _is_bf16_on_cpu(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def _memory(like: Tensor, rows: int, vocabulary_size: int) -> Tensor:
    """Enough for any of the tiles, as _matrix(memory, rows, columns of the tile)."""
    return like.new_empty(rows * min(vocabulary_size, COLUMNS_PER_TILE))


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _slices(num_tokens: int) -> Iterator[slice]:
    """Tokens for which [tokens, H] may be copied."""
    for first in range(0, num_tokens, TOKENS_AT_ONCE):
        yield slice(first, first + TOKENS_AT_ONCE)
