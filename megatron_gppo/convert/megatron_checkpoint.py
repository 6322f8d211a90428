"""Megatron's torch_dist checkpoints, read and written without Megatron and without a process group.

    metadata.json     the format's name and version
    common.pt         what is not a tensor; empty here
    .metadata         a pickled torch.distributed.checkpoint Metadata: for every tensor its shape and chunks, for every
                      chunk its file, position and length
    __0_0.distcp ...  the chunks, each as torch.save writes it
    hf/               not Megatron's: the files of the HF folder beside its weights, so that exporting needs nothing else

A converted checkpoint has one chunk a tensor. One saved by training has the chunks of its layout, a padded vocabulary and the
optimizer's state beside the model. Both load into any layout.
"""

import io
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.layout import Shape, Vocabulary
from megatron_gppo.convert.table import Parameter, parameters

HF_ASSETS = "hf"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_FILE_BYTES = 5 * 10**9


class MegatronCheckpoint:
    """A torch_dist checkpoint with one key a layer. Opening it reads the metadata alone.

    Raises ConvertError, naming the folder, for one that is missing, incomplete or of another format. As everywhere with
    torch.distributed.checkpoint, the metadata is unpickled: open only checkpoints that you trust.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            described = json.loads((self.folder / "metadata.json").read_text())
        except (OSError, ValueError) as error:
            raise ConvertError(
                f"{self.folder / 'metadata.json'}: cannot be read. Fix: give the folder of a torch_dist checkpoint"
            ) from error
        if not isinstance(described, dict) or described.get("sharded_backend") != FORMAT["sharded_backend"]:
            raise ConvertError(f"{self.folder / 'metadata.json'}: is not of a torch_dist checkpoint")
        try:
            self.metadata = FileSystemReader(self.folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise ConvertError(
                f"{self.folder / '.metadata'}: cannot be read, so the checkpoint is incomplete"
            ) from error

    def architecture(self) -> Architecture:
        """From hf/config.json. Raises ConvertError."""
        if not (self.folder / HF_ASSETS).is_dir():
            raise ConvertError(
                f"{self.folder / HF_ASSETS}: is missing, so nothing says what model this is. "
                f"Fix: put the HF model's config.json and tokenizer files there"
            )
        return Architecture.from_hf(self.folder / HF_ASSETS)

    def dtype(self, name: str) -> torch.dtype:
        return self.metadata.state_dict_metadata[name].properties.dtype  # type: ignore[union-attr]

    def check(self, architecture: Architecture) -> None:
        """Raises ConvertError unless every parameter of the architecture is there, in its shape and all in one dtype."""
        dtypes = set()
        for parameter in parameters(architecture):
            stored = self.metadata.state_dict_metadata.get(parameter.name)
            if not isinstance(stored, TensorStorageMetadata):
                raise ConvertError(f"{self.folder}: has no parameter {parameter.name}. Is it of another model?")
            if not _fits(parameter, tuple(stored.size)):
                raise ConvertError(
                    f"{self.folder}: {parameter.name} has shape {list(stored.size)}, but {architecture.name} as configured "
                    f"has {list(parameter.shape)}. Is it of another model?"
                )
            dtypes.add(stored.properties.dtype)
        if len(dtypes) > 1:
            raise ConvertError(f"{self.folder}: weights of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
        layers = f"decoder.layers.{architecture.num_layers}."
        if any(name.startswith(layers) for name in self.metadata.state_dict_metadata):
            raise ConvertError(f"{self.folder}: has more than num_hidden_layers = {architecture.num_layers} layers")

    def read(self, parameter: Parameter) -> Tensor:
        """The full tensor, without vocabulary padding. Raises ConvertError if a file is missing or damaged."""
        stored = self.metadata.state_dict_metadata[parameter.name]
        assert isinstance(stored, TensorStorageMetadata), "check was not called"
        if len(stored.chunks) == 1:
            full = self._read_chunk(parameter.name, stored.chunks[0])
        else:
            full = torch.empty(stored.size, dtype=stored.properties.dtype)
            for chunk in stored.chunks:
                region = tuple(
                    slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                full[region] = self._read_chunk(parameter.name, chunk)
        return full[: parameter.shape[0]]

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                section = io.BufferedReader(_Section(file, info.offset, info.length))
                tensor = torch.load(section, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConvertError(f"{path}: {name} cannot be read; the file is missing, truncated or damaged") from error
        if tensor.shape != chunk.sizes:
            raise ConvertError(f"{path}: {name} has a chunk of shape {list(tensor.shape)}, not {list(chunk.sizes)}")
        return tensor


def _fits(parameter: Parameter, shape: Shape) -> bool:
    if isinstance(parameter.layout, Vocabulary):  # saved as it was trained, padded to a multiple of TP
        return shape[1:] == parameter.shape[1:] and shape[0] >= parameter.shape[0]
    return shape == parameter.shape


def write_megatron_checkpoint(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes full tensors by canonical name to an empty folder, as they come, in files of MAX_FILE_BYTES and a tensor at most."""
    metadata = Metadata({}, planner_data={}, storage_data={}, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    num_files = 0
    file: IO[bytes] | None = None
    try:
        for name, tensor in tensors:
            if file is None or file.tell() >= MAX_FILE_BYTES:
                if file is not None:
                    _sync_and_close(file)
                path = folder / f"__0_{num_files}.distcp"
                file = path.open("wb")
                num_files += 1
            start, origin = file.tell(), torch.Size([0] * tensor.dim())
            # torch.save writes all of a view's storage
            torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), file)
            metadata.state_dict_metadata[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=tensor.shape,
                chunks=[ChunkStorageMetadata(offsets=origin, sizes=tensor.shape)],
            )
            info = _StorageInfo(path.name, start, file.tell() - start)
            metadata.storage_data[MetadataIndex(name, origin)] = info
    finally:
        if file is not None:
            _sync_and_close(file)
    with (folder / "common.pt").open("wb") as file:
        torch.save({}, file)
        _sync_and_close(file)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
        _sync_and_close(file)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class _Section(io.RawIOBase):
    """A part of a file as a file: torch.load looks for the end of what it is given."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def readinto(self, buffer: Any) -> int:
        room = max(0, self._length - self.tell())
        return self._file.readinto(memoryview(buffer).cast("B")[:room])  # type: ignore[attr-defined]
