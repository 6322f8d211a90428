"""The part of a vocabulary that a tensor-parallel rank holds, and the tiles in which it is visited."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

COLUMNS_PER_TILE = 4096  # a rank with no more columns than these has its logits in one tile


@dataclass(frozen=True, slots=True)
class Tile:
    """Some of a rank's columns, and the targets among them."""

    columns: slice  # of the rank
    tokens: Tensor  # [n] int64: those whose target is there
    places: Tensor  # [n] int64: the targets, counted from the first of the columns


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The part of the vocabulary on this rank."""

    group: dist.ProcessGroup | None
    first_id: int  # global id of column 0
    num_columns: int  # that are not padding; they come first
    vocab_size: int  # over all ranks, without padding

    def tiles(self, targets: Tensor) -> list[Tile]:
        """The columns that are not padding, and which of the [T] targets are where; reads one small tensor back."""
        starts = range(0, self.num_columns, COLUMNS_PER_TILE)
        # All at once, and not for every tile again: many small operations take a GPU longer than the tile's products.
        place, tokens = (targets - self.first_id).sort(stable=True)
        ends = torch.tensor([*starts, self.num_columns], device=place.device)
        first, *firsts = torch.searchsorted(place, ends).tolist()
        tiles = []
        for start, last in zip(starts, firsts, strict=True):
            columns = slice(start, min(start + COLUMNS_PER_TILE, self.num_columns))
            tiles.append(Tile(columns, tokens[first:last], place[first:last] - start))
            first = last
        return tiles

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where the targets are among this rank's columns that are not padding.

        Returns ([T] column, [T] bool whether it is there). The column of a target that is not there is the nearest one.
        """
        column = targets - self.first_id
        return column.clamp(0, max(self.num_columns - 1, 0)), (column >= 0) & (column < self.num_columns)


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
