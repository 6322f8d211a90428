"""HF folder -> torch_dist checkpoint."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.finite import warn_of_non_finite
from megatron_gppo.convert.full_tensors import read_full
from megatron_gppo.convert.hf_checkpoint import HfCheckpoint, keep_hf_assets
from megatron_gppo.convert.mapping import render_mapping
from megatron_gppo.convert.megatron_checkpoint import HF_ASSETS, MegatronCheckpoint, write_megatron_checkpoint
from megatron_gppo.convert.memory import same_bits
from megatron_gppo.convert.output_folder import check_output, output_folder, sync_tree
from megatron_gppo.convert.prefetch import prefetched
from megatron_gppo.convert.progress import Converted, ProgressBar, progress_bar
from megatron_gppo.convert.table import Parameter, hf_shapes, iter_parameters, parameters
from megatron_gppo.convert.written import audit, check_dtype, check_names


def convert_hf_to_megatron(
    hf_path: str | Path,
    output: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Converted:
    """Writes the model at `hf_path` as a torch_dist checkpoint that loads at any layout.

    tp, pp and ep are only checked against the model. Values stay as they are, bit for bit, unless `dtype` (float32 or
    bfloat16) is another one than the weights have. Three parameters (an expert is one) are in memory at a time. The
    names, shapes and dtypes of what was written are checked against the model; `verify` also reads every tensor back and
    compares its bits. `output` appears when all that is done.

    Raises ConvertError, having written nothing, for a model that is not supported, incomplete or damaged, a layout that it
    does not admit, and an output folder that is in use, too small or not writable. Logs a warning for NaN and infinity.
    """
    opened = _Opened.open(hf_path, tp=tp, pp=pp, ep=ep, dtype=dtype)
    source = opened.source
    start, verify_seconds = time.perf_counter(), None
    with output_folder(output, source.folder, opened.num_bytes, overwrite) as folder:
        with ExitStack() as stack:
            bar = stack.enter_context(progress_bar(opened.num_bytes, "HF to Megatron", progress))
            tensors = stack.enter_context(prefetched(read_full(source, opened.table)))
            write_megatron_checkpoint(folder, _converted(source, tensors, opened.dtype, bar))
        keep_hf_assets(hf_path, folder / HF_ASSETS)

        with audit():
            written = MegatronCheckpoint(folder)
            written.check(opened.architecture)
            check_names(written.metadata.state_dict_metadata.keys(), {parameter.key for parameter in opened.table})
            check_dtype(written.dtype(opened.architecture), opened.dtype, "the checkpoint")
        sync_tree(folder)
        seconds = time.perf_counter() - start
        if verify:
            with progress_bar(opened.num_bytes, "Verify", progress) as bar:
                _verify(written, source, opened, bar)
            verify_seconds = time.perf_counter() - start - seconds
    return Converted(opened.num_bytes, seconds, verify_seconds)


def describe_hf_to_megatron(
    hf_path: str | Path,
    output: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> str:
    """What convert_hf_to_megatron would do, with every tensor's names, rule and shape. Raises what it would, and writes nothing."""
    opened = _Opened.open(hf_path, tp=tp, pp=pp, ep=ep, dtype=dtype)
    check_output(output, opened.source.folder, opened.num_bytes, overwrite)
    return render_mapping(
        opened.table, opened.source.dtype, opened.dtype, stacked_experts=opened.source.stacked_experts
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model that can be converted."""

    source: HfCheckpoint
    architecture: Architecture
    table: list[Parameter]
    dtype: torch.dtype  # to write

    @classmethod
    def open(cls, hf_path: str | Path, *, tp: int, pp: int, ep: int, dtype: torch.dtype | None) -> "_Opened":
        architecture = Architecture.from_hf(hf_path)
        architecture.check_layout(tp=tp, pp=pp, ep=ep)
        source = HfCheckpoint(hf_path)
        source.check(hf_shapes(iter_parameters(architecture)))
        return cls(source, architecture, parameters(architecture), dtype or source.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(parameter.shape) for parameter in self.table) * self.dtype.itemsize


def _converted(
    source: HfCheckpoint, tensors: Iterator[tuple[Parameter, Tensor]], dtype: torch.dtype, bar: ProgressBar
) -> Iterator[tuple[Parameter, Tensor]]:
    for parameter, full in tensors:
        converted = full.to(dtype)
        warn_of_non_finite(source.folder, parameter, full, converted)
        bar.update(converted.nbytes)
        yield parameter, converted


def _verify(written: MegatronCheckpoint, source: HfCheckpoint, opened: _Opened, bar: ProgressBar) -> None:
    with prefetched((parameter, written.read(parameter)) for parameter in opened.table) as fulls:
        for parameter, full in fulls:
            for name, tensor in parameter.to_hf(full):
                if not same_bits(tensor, source.read(name).to(opened.dtype)):
                    raise ConvertError(
                        f"{written.folder.name}: {parameter.name} was read back with other bits than {name} of {source.folder} has. "
                        f"Fix: check the disk, and that nothing else writes to either folder"
                    )
            bar.update(full.nbytes)
