"""torch_dist checkpoint -> HF folder."""

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megatron_gppo.convert.hf_checkpoint import copy_hf_assets, write_weights
from megatron_gppo.convert.megatron_checkpoint import HF_ASSETS, MegatronCheckpoint
from megatron_gppo.convert.output_folder import output_folder
from megatron_gppo.convert.table import Parameter, parameters


def convert_megatron_to_hf(
    checkpoint: str | Path, output: str | Path, *, overwrite: bool = False, progress: bool = False
) -> None:
    """Writes a converted checkpoint, or one that training saved, as an HF folder with safetensors.

    Values and dtype stay as they are, bit for bit; padding of the vocabulary and optimizer state are left out. One
    parameter is in memory at a time. `output` appears when it is complete.

    Raises ConvertError, having written nothing, for a checkpoint that is incomplete, damaged or does not match its
    hf/config.json, and an output folder that is in use, too small or not writable.
    """
    source = MegatronCheckpoint(checkpoint)
    architecture = source.architecture()
    source.check(architecture)
    table = parameters(architecture)
    dtype = source.dtype(table[0].name)
    shapes = {name: shape for p in table for name, shape in zip(p.hf_names, p.hf_shapes, strict=True)}

    num_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    with (
        output_folder(output, source.folder, num_bytes, overwrite) as folder,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Megatron to HF", disable=not progress) as bar,
    ):
        write_weights(folder, shapes, dtype, _converted(source, table, bar))
        copy_hf_assets(source.folder / HF_ASSETS, folder)


def _converted(source: MegatronCheckpoint, table: list[Parameter], bar: "tqdm[None]") -> Iterator[tuple[str, Tensor]]:
    for parameter in table:
        for name, tensor in parameter.to_hf(source.read(parameter)):
            bar.update(tensor.nbytes)
            yield name, tensor
