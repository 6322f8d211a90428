"""torch_dist checkpoint -> HF folder."""

import json
import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_gppo.convert.architecture import DTYPES, Architecture
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.finite import warn_of_non_finite
from megatron_gppo.convert.full_tensors import read_full
from megatron_gppo.convert.hf_checkpoint import HfCheckpoint, copy_hf_assets, exports_stacked_experts
from megatron_gppo.convert.hf_weights import MAX_SHARD_BYTES, write_weights
from megatron_gppo.convert.layout import Shape
from megatron_gppo.convert.mapping import render_mapping
from megatron_gppo.convert.megatron_checkpoint import HF_ASSETS, MegatronCheckpoint
from megatron_gppo.convert.memory import same_bits
from megatron_gppo.convert.output_folder import check_output, output_folder, sync_tree
from megatron_gppo.convert.prefetch import prefetched
from megatron_gppo.convert.progress import Converted, ProgressBar, progress_bar
from megatron_gppo.convert.stacked_experts import stack
from megatron_gppo.convert.table import Parameter, hf_shapes, parameters
from megatron_gppo.convert.written import audit, check_dtype, check_names

logger = logging.getLogger(__name__)


def convert_megatron_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stacked_experts: bool | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Converted:
    """Writes a converted checkpoint, or one that training saved, as an HF folder with safetensors.

    Values stay as they are, bit for bit, unless `dtype` (float32 or bfloat16) is another one than the checkpoint has; padding
    of the vocabulary and optimizer state are left out. config.json, generation config, tokenizer and chat template are the
    source model's; config.json's dtype becomes that of the weights. Files of at most `max_shard_bytes`, or one tensor.
    Experts are stored as the source model stored them unless `stacked_experts` says how. Three parameters (an expert is one)
    are in memory at a time. The names, shapes and dtypes of what was written are checked against the model; `verify` also
    reads every tensor back and compares its bits. `output` appears when all that is done.

    Raises ConvertError, having written nothing, for a checkpoint that is incomplete, damaged or does not match its
    hf/config.json, and an output folder that is in use, too small or not writable. Logs a warning for NaN and infinity.
    """
    opened = _Opened.open(checkpoint, dtype, stacked_experts)
    source = opened.source
    start, verify_seconds = time.perf_counter(), None
    with output_folder(output, source.folder, opened.num_bytes, overwrite) as folder:
        with ExitStack() as resources:
            bar = resources.enter_context(progress_bar(opened.num_bytes, "Megatron to HF", progress))
            tensors = resources.enter_context(
                prefetched((parameter, source.read(parameter)) for parameter in opened.table)
            )
            # Closed, because after its last tensor it would hold that one.
            converted = resources.enter_context(closing(_converted(source, tensors, opened.dtype, bar)))
            write_weights(folder, opened.stored_shapes(), opened.dtype, converted, max_shard_bytes)
        copy_hf_assets(source.folder / HF_ASSETS, folder)
        if opened.architecture.dtype != opened.dtype:
            _set_config_dtype(folder / "config.json", opened.dtype)

        with audit():
            written = HfCheckpoint(folder)
            written.check(hf_shapes(opened.table))
            check_names(written.tensors.keys(), opened.hf_shapes().keys())
            check_dtype(written.dtype, opened.dtype, "the folder")
            check_dtype(Architecture.from_hf(folder).dtype, opened.dtype, "config.json")
        sync_tree(folder)
        seconds = time.perf_counter() - start
        if verify:
            with progress_bar(opened.num_bytes, "Verify", progress) as bar:
                _verify(written, source, opened, bar)
            verify_seconds = time.perf_counter() - start - seconds
    if opened.stacked_experts:
        logger.warning(
            "%s: experts are stacked, which SGLang's loader (0.5.23) skips without an error. Fix: --experts separate",
            output,
        )
    return Converted(opened.num_bytes, seconds, verify_seconds)


def describe_megatron_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    stacked_experts: bool | None = None,
    overwrite: bool = False,
) -> str:
    """What convert_megatron_to_hf would do, with every tensor's names, rule and shape. Raises what it would, and writes nothing."""
    opened = _Opened.open(checkpoint, dtype, stacked_experts)
    check_output(output, opened.source.folder, opened.num_bytes, overwrite)
    source_dtype = opened.source.dtype(opened.architecture)
    return render_mapping(opened.table, source_dtype, opened.dtype, stacked_experts=opened.stacked_experts)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint that can be converted."""

    source: MegatronCheckpoint
    architecture: Architecture
    table: list[Parameter]
    dtype: torch.dtype  # to write
    stacked_experts: bool  # to write

    @classmethod
    def open(cls, checkpoint: str | Path, dtype: torch.dtype | None, stacked_experts: bool | None) -> "_Opened":
        """Raises ConvertError. None: as the checkpoint has it."""
        source = MegatronCheckpoint(checkpoint)
        architecture = source.architecture()
        source.check(architecture)
        if stacked_experts is None:
            stacked_experts = exports_stacked_experts(source.folder / HF_ASSETS)
        return cls(
            source,
            architecture,
            parameters(architecture),
            dtype or source.dtype(architecture),
            stacked_experts and architecture.num_experts > 0,
        )

    def hf_shapes(self) -> dict[str, Shape]:
        return dict(hf_shapes(self.table))

    def stored_shapes(self) -> dict[str, Shape]:
        return stack(self.hf_shapes()) if self.stacked_experts else self.hf_shapes()

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) for shape in self.hf_shapes().values()) * self.dtype.itemsize


def _converted(
    source: MegatronCheckpoint, tensors: Iterator[tuple[Parameter, Tensor]], dtype: torch.dtype, bar: ProgressBar
) -> Generator[Tensor, None, None]:
    for parameter, full in tensors:
        converted = full.to(dtype)
        warn_of_non_finite(source.folder, parameter, full, converted)
        for _, tensor in parameter.to_hf(converted):
            bar.update(tensor.nbytes)
            yield tensor


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Under the name that the file has for it: torch_dtype before transformers 5."""
    config = json.loads(path.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[field] = next(name for name, value in DTYPES.items() if value == dtype)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(written: HfCheckpoint, source: MegatronCheckpoint, opened: _Opened, bar: ProgressBar) -> None:
    with prefetched(read_full(written, opened.table)) as fulls:
        for parameter, full in fulls:
            if not same_bits(full, source.read(parameter).to(opened.dtype)):
                raise ConvertError(
                    f"{written.folder.name}: {', '.join(parameter.hf_names)} were read back with other bits than {parameter.name} of "
                    f"{source.folder} has. Fix: check the disk, and that nothing else writes to either folder"
                )
            bar.update(full.nbytes)
