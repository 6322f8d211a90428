"""The part of a vocabulary that a tensor-parallel rank holds, and the tiles in which it is visited."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

COLUMNS_PER_TILE = 4096  # a rank with no more columns than these has its logits in one tile


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The part of the vocabulary on this rank."""

    group: dist.ProcessGroup | None
    first_id: int  # global id of column 0
    num_columns: int  # that are not padding; they come first
    vocab_size: int  # over all ranks, without padding

    def tiles(self) -> Iterator[slice]:
        """The columns that are not padding, a tile at a time."""
        for first in range(0, self.num_columns, COLUMNS_PER_TILE):
            yield slice(first, min(first + COLUMNS_PER_TILE, self.num_columns))

    def find(self, targets: Tensor, columns: slice | None = None) -> tuple[Tensor, Tensor]:
        """Where the targets are among these columns, or among all of this rank that are not padding.

        Returns ([T] place counted from the first of the columns, [T] bool whether it is there). The place of a target that
        is not there is that of the nearest column.
        """
        columns = columns or slice(0, self.num_columns)
        place = targets - (self.first_id + columns.start)
        size = columns.stop - columns.start
        return place.clamp(0, max(size - 1, 0)), (place >= 0) & (place < size)


def vocabulary_shard(num_rows: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabularyShard:
    """Raises ValueError when vocab_size does not fit the rows of all ranks."""
    rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    vocab_size = num_rows * size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= num_rows * size:
        raise ValueError(
            f"vocab_size = {vocab_size}. Fix: pass 1 to {num_rows * size}, {size} ranks of {num_rows} rows"
        )
    first_id = rank * num_rows
    return VocabularyShard(tp_group, first_id, min(max(vocab_size - first_id, 0), num_rows), vocab_size)
