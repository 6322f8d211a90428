"""Reading HF model folders: safetensors, one file or shards with an index, and the files beside them.

Tensors are read one at a time, by position: mapping the files instead would count them whole as resident memory.
"""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.json_text import parse_json
from megatron_gppo.convert.layout import Shape
from megatron_gppo.convert.memory import memory_of, same_bits
from megatron_gppo.convert.stacked_experts import unstack

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Beside a converted model's config.json: what exporting must know and no HF file says.
EXPORT_FILE = "export.json"
_COPY_AGAIN = "Fix: copy or download it again"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HfCheckpoint:
    """The weights of an HF folder. Opening it reads every header and checks it against its file's size.

    Experts have a tensor each, whether the folder stores them like that or stacked.

    Raises ConvertError, naming file and tensor, for files that are missing, truncated or not safetensors, tensors that
    the index places elsewhere, and a dtype other than float32 and bfloat16, or both in one model.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._stacked: set[str] = set()
        index = _read_index(self.folder)
        for file in sorted(set(index.values())) if index else [SINGLE_FILE]:
            for name, tensor in _read_header(self.folder / file).items():
                if index and index.get(name) != file:
                    where = index.get(name, "nowhere")
                    raise ConvertError(
                        f"{self.folder / file}: holds {name}, which {INDEX_FILE} places {where}. {_COPY_AGAIN}"
                    )
                self._add(name, tensor)
        for name, file in index.items():
            if name not in self.tensors and name not in self._stacked:
                raise ConvertError(
                    f"{self.folder / file}: lacks {name}, which {INDEX_FILE} places there. {_COPY_AGAIN}"
                )
        if not self.tensors:
            raise ConvertError(f"{self.folder}: holds no tensors. {_COPY_AGAIN}")
        dtypes = {tensor.dtype: name for name, tensor in self.tensors.items()}
        if len(dtypes) > 1:
            examples = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise ConvertError(f"{self.folder}: weights of several dtypes ({examples}). Fix: save the model in one")

    @property
    def stacked_experts(self) -> bool:
        return bool(self._stacked)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    def check(self, expected: Iterable[tuple[str, Shape]]) -> None:
        """Raises ConvertError unless exactly the expected tensors are there, in their shapes.

        `expected` is not read beyond the first that is not there: a config.json that is damaged may ask for any number.

        Two kinds of surplus are harmless and pass: rotary_emb.inv_freq, which old versions of transformers saved, and
        an lm_head.weight of a model with tied embeddings that equals the embedding bit for bit.
        """
        names = set()
        for name, shape in expected:
            names.add(name)
            tensor = self.tensors.get(name)
            if tensor is None:
                raise ConvertError(
                    f"{self.folder}: tensor {name} is missing. Fix: copy or download the weights again, or correct config.json"
                )
            if tensor.shape != shape:
                raise ConvertError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}. "
                    f"Fix: correct config.json, or take the weights that belong to it"
                )
        for name in sorted(self.tensors.keys() - names):
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight":
                if same_bits(self.read(name), self.read("model.embed_tokens.weight")):
                    continue
                raise ConvertError(
                    f"{self.tensors[name].file}: lm_head.weight differs from the embedding, but config.json says "
                    f"tie_word_embeddings = true. Fix: set it to false"
                )
            raise ConvertError(
                f"{self.tensors[name].file}: tensor {name} is not one that config.json asks for. "
                f"Fix: correct config.json, or take the weights that belong to it"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Fills a contiguous tensor of the same shape and dtype. Raises ConvertError if the file has changed."""
        stored = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            _read_into(file, memory_of(tensor), stored.file)

    def _add(self, name: str, tensor: StoredTensor) -> None:
        offset = tensor.offset
        parts = unstack(name, tensor.shape)
        for part, shape in parts:
            if part in self.tensors:
                raise ConvertError(
                    f"{tensor.file}: {name} holds {part}, which {self.tensors[part].file} holds, too. Fix: remove one"
                )
            self.tensors[part] = StoredTensor(tensor.file, offset, tensor.dtype, shape)
            offset += self.tensors[part].num_bytes
        if parts:
            self._stacked.add(name)
        elif name in self.tensors:
            raise ConvertError(f"{tensor.file}: holds {name}, which is there twice. Fix: remove one")
        else:
            self.tensors[name] = tensor


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty for a model in a single file."""
    path = folder / INDEX_FILE
    if not path.exists():
        if (folder / SINGLE_FILE).is_file():
            return {}
        if other := sorted(file.name for file in folder.glob("pytorch_model*")):
            raise ConvertError(
                f"{folder}: has {other[0]}, but weights are read from safetensors alone. "
                f"Fix: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of transformers writes these"
            )
        raise ConvertError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}. Fix: give the folder of an HF model")
    try:
        weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path}: not an index of safetensors files. {_COPY_AGAIN}") from error
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}. Fix: see to its permissions and the disk") from error
    if not index:
        raise ConvertError(f"{path}: its weight_map names no tensors. {_COPY_AGAIN}")
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise ConvertError(f"{folder / file}: is missing, but {INDEX_FILE} names it. {_COPY_AGAIN}")
    return index


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ConvertError(f"{path}: truncated, or not a safetensors file. {_COPY_AGAIN}")
            encoded = file.read(length)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}. Fix: see to its permissions and the disk") from error
    try:
        header = parse_json(encoded)
        header.pop("__metadata__", None)
        entries = [
            (str(name), str(entry["dtype"]), _counts(entry["shape"]), _counts(entry["data_offsets"]))
            for name, entry in header.items()
        ]
        entries.sort(key=lambda entry: entry[3])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path}: not a safetensors file: its header cannot be read. {_COPY_AGAIN}") from error

    tensors, previous_end = {}, 0
    for name, dtype, shape, offsets in entries:
        # The format allows neither holes nor overlaps; a header with them would give a tensor another one's bytes.
        if len(offsets) != 2 or offsets[0] != previous_end:
            raise ConvertError(
                f"{path}: damaged: its header places tensor {name} at {list(offsets)}, but the one before ends at {previous_end}. "
                f"{_COPY_AGAIN}"
            )
        begin, end = offsets
        previous_end = end
        if dtype not in DTYPES:
            raise ConvertError(
                f"{path}: tensor {name} has dtype {dtype}; only {', '.join(DTYPES)} are supported. Fix: save the model in one"
            )
        tensor = StoredTensor(path, 8 + length + begin, DTYPES[dtype], shape)
        if end - begin != tensor.num_bytes:
            raise ConvertError(
                f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} takes {end - begin} bytes. {_COPY_AGAIN}"
            )
        if 8 + length + end > size:
            raise ConvertError(
                f"{path}: truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}. {_COPY_AGAIN}"
            )
        tensors[name] = tensor
    return tensors


def _counts(values: list[object]) -> tuple[int, ...]:
    """Raises ValueError for anything but whole numbers from 0."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(values)
    return tuple(values)  # type: ignore[arg-type]


def _read_into(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):  # one read is at most 2 GiB
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise ConvertError(
                f"{path}: became shorter while it was read. Fix: see to it that nothing else writes there"
            )
        filled += count


def copy_hf_assets(source: str | Path, destination: str | Path) -> None:
    """Copies everything but weights from one HF folder to another: config, generation config, tokenizer, chat template.

    Subfolders are left out. `destination` is created; files there are replaced.
    """
    Path(destination).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name != EXPORT_FILE:
            shutil.copyfile(path, Path(destination) / path.name)


def keep_hf_assets(hf_path: str | Path, destination: str | Path) -> None:
    """copy_hf_assets, with a note of how `hf_path` stores experts, so that an export can do the same."""
    copy_hf_assets(hf_path, destination)
    if _names_stacked_experts(Path(hf_path)) or exports_stacked_experts(hf_path):
        (Path(destination) / EXPORT_FILE).write_text(json.dumps({"stacked_experts": True}) + "\n", encoding="utf-8")


def exports_stacked_experts(assets: str | Path) -> bool:
    """What keep_hf_assets noted."""
    path = Path(assets) / EXPORT_FILE
    try:
        return path.exists() and bool(parse_json(path.read_text(encoding="utf-8")).get("stacked_experts"))
    except (ValueError, AttributeError) as error:
        raise ConvertError(f"{path}: not valid. Fix: remove it to export a tensor an expert") from error


def _names_stacked_experts(folder: Path) -> bool:
    """False for a folder without weights, as that of an engine that runs elsewhere."""
    if (folder / INDEX_FILE).exists():
        return any(name.endswith(".mlp.experts.gate_up_proj") for name in _read_index(folder))
    if (folder / SINGLE_FILE).exists():
        return any(name.endswith(".mlp.experts.gate_up_proj") for name in _read_header(folder / SINGLE_FILE))
    return False
