"""Full tensors of parameters, read from HF files."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_gppo.convert.hf_checkpoint import HfCheckpoint
from megatron_gppo.convert.table import Parameter


def read_full(source: HfCheckpoint, parameters: Iterable[Parameter]) -> Iterator[tuple[Parameter, Tensor]]:
    """One after the other, each in memory of its own."""
    for parameter in parameters:
        full = torch.empty(parameter.shape, dtype=source.dtype)
        parts = parameter.to_hf(full)
        if all(part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr() for _, part in parts):
            for name, part in parts:  # ranges of rows: no need to merge
                source.read_into(name, part)
        else:
            full = parameter.from_hf({name: source.read(name) for name in parameter.hf_names})
        yield parameter, full
