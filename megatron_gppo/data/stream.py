"""The order in which prompts are trained on.

Invariants, each tested: the prompt at a position depends on prompts, seed and weights alone, so a stream goes on exactly
from its position, whoever asks and on however many ranks; without weights every epoch has every prompt once; with
weights every epoch has a fixed number of slots for each source, and a source repeats no prompt before all were drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_gppo.data.errors import DataError
from megatron_gppo.datatypes import Prompt


class Share(NamedTuple):
    """A source's part in a weighted mixture."""

    size: int  # its prompts, which follow those of the share before
    weight: float


class PromptStream:
    """An endless stream over the prompts, epoch after epoch, that is resumed by one integer.

    ``PromptStream(..., position=k)`` continues where a stream stood after k prompts. With `shares`, whose sizes add up
    to the prompts, an epoch has as many slots as there are prompts, divided among the sources by weight: at least one
    each, and rounded.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        shuffle: bool,
        seed: int,
        position: int = 0,
        shares: Sequence[Share] | None = None,
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts to draw from")
        if position < 0:
            raise ValueError(f"position = {position} is negative")
        self._prompts = prompts
        self._shuffle = shuffle
        self._seed = seed
        self._position = position
        self._shares = [share for share in shares if share.size > 0] if shares is not None else None
        self._epoch = -1  # the epoch that _order belongs to
        self._order: Sequence[int] = []
        if self._shares is None:
            self._slots = [len(prompts)]
        else:
            assert sum(share.size for share in self._shares) == len(prompts)
            total = sum(share.weight for share in self._shares)
            self._slots = [max(1, round(len(prompts) * share.weight / total)) for share in self._shares]

    @property
    def position(self) -> int:
        """Prompts taken since the beginning of the first epoch."""
        return self._position

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; across the end of an epoch they come from two epochs."""
        return [self._next() for _ in range(n)]

    def _next(self) -> Prompt:
        epoch, index = divmod(self._position, sum(self._slots))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        self._position += 1
        return self._prompts[self._order[index]]

    def _order_of(self, epoch: int) -> Sequence[int]:
        drawn = range(len(self._prompts)) if self._shares is None else self._drawn(self._shares, epoch)
        return [drawn[slot] for slot in self._permutation(len(drawn), epoch)] if self._shuffle else drawn

    def _drawn(self, shares: Sequence[Share], epoch: int) -> list[int]:
        """The prompts of an epoch's slots, the sources evenly interleaved."""
        placed: list[tuple[float, int]] = []
        start = 0
        for source, (share, slots) in enumerate(zip(shares, self._slots, strict=True), start=1):
            for slot in range(slots):
                # Each source goes through its own prompts again and again, whatever the length of an epoch.
                round_, index = divmod(epoch * slots + slot, share.size)
                if slot == 0 or index == 0:
                    order = self._permutation(share.size, round_, source) if self._shuffle else range(share.size)
                placed.append(((slot + 0.5) / slots, start + order[index]))
            start += share.size
        return [prompt for _, prompt in sorted(placed, key=lambda at: at[0])]

    def _permutation(self, size: int, *stream: int) -> list[int]:
        # RandomState, because NumPy freezes its streams for ever and reserves the right to change Generator's:
        # a run must resume in the same order after an upgrade.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, *stream])))
        return random.permutation(size).tolist()
