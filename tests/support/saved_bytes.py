"""How many bytes autograd keeps for the backward, measured."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


class SavedBytes:
    """Storages that autograd holds: each counts once, however many tensors share it, and whole, however little is used."""

    def __init__(self, parameters: Collection[torch.nn.Parameter]) -> None:
        self.peak = 0
        self.shapes_at_peak: Counter[tuple[int, ...]] = Counter()
        self._not_counted = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._holders: Counter[int] = Counter()  # by storage: how many saved tensors need it
        self._sizes: dict[int, int] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> "_Kept":
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._not_counted:
            self._holders[key] += 1
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, sum(self._sizes.values()))
            weakref.finalize(kept, self._let_go, key)
        return kept

    def _let_go(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key], self._sizes[key]


class _Kept:
    """Lives as long as the node of the graph that saved the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
