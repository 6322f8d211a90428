"""HF folder -> torch_dist checkpoint."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.hf_checkpoint import HfCheckpoint, copy_hf_assets
from megatron_gppo.convert.megatron_checkpoint import HF_ASSETS, write_megatron_checkpoint
from megatron_gppo.convert.output_folder import output_folder
from megatron_gppo.convert.table import Parameter, parameters

logger = logging.getLogger(__name__)


def convert_hf_to_megatron(
    hf_path: str | Path,
    output: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the model at `hf_path` as a torch_dist checkpoint that loads at any layout.

    tp, pp and ep are only checked against the model. Values and dtype stay as they are, bit for bit. One parameter is
    in memory at a time. `output` appears when it is complete.

    Raises ConvertError, having written nothing, for a model that is not supported, incomplete or damaged, a layout that it
    does not admit, and an output folder that is in use, too small or not writable. Logs a warning for NaN and infinity.
    """
    architecture = Architecture.from_hf(hf_path)
    architecture.check_layout(tp=tp, pp=pp, ep=ep)
    table = parameters(architecture)
    source = HfCheckpoint(hf_path)
    source.check({name: shape for p in table for name, shape in zip(p.hf_names, p.hf_shapes, strict=True)})

    num_bytes = sum(math.prod(p.shape) for p in table) * source.dtype.itemsize
    with (
        output_folder(output, source.folder, num_bytes, overwrite) as folder,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="HF to Megatron", disable=not progress) as bar,
    ):
        write_megatron_checkpoint(folder, _converted(source, table, bar))
        copy_hf_assets(hf_path, folder / HF_ASSETS)


def _converted(source: HfCheckpoint, table: list[Parameter], bar: "tqdm[None]") -> Iterator[tuple[str, Tensor]]:
    for parameter in table:
        tensors = {name: source.read(name) for name in parameter.hf_names}
        for name, tensor in tensors.items():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                logger.warning("%s: %s holds NaN or infinity", source.tensors[name].file, name)
        full = parameter.from_hf(tensors)
        bar.update(full.nbytes)
        yield parameter.name, full
