"""Megatron's torch_dist checkpoints, read and written without Megatron and without a process group.

    metadata.json     the format's name and version
    common.pt         what is not a tensor; empty here
    .metadata         a pickled torch.distributed.checkpoint Metadata: for every tensor its shape and chunks, for every
                      chunk its file, position and length
    __0_0.distcp ...  the chunks, each as torch.save writes it
    hf/               not Megatron's: the files of the HF folder beside its weights, so that exporting needs nothing else

A converted checkpoint has one chunk a parameter: a tensor is one chunk, and a layer's experts, which share a tensor
[experts, ...], are one each. A checkpoint saved by training has the chunks of its layout, a padded vocabulary and the optimizer's
state beside the model. Both load into any layout.
"""

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
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
from megatron_gppo.convert.durable_file import DurableFile
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.hf_checkpoint import DTYPES
from megatron_gppo.convert.json_text import parse_json
from megatron_gppo.convert.layout import Shape, Vocabulary
from megatron_gppo.convert.table import Parameter, iter_parameters

HF_ASSETS = "hf"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_FILE_BYTES = 5 * 10**9
DTYPE_LIST = ", ".join(map(str, DTYPES.values()))
_ANOTHER_MODEL = "Fix: see to it that hf/config.json is of the model that was saved"
_COPY_AGAIN = "Fix: copy the checkpoint again, or take another one"


class MegatronCheckpoint:
    """A torch_dist checkpoint with one key a layer. Opening it reads the metadata alone.

    Raises ConvertError, naming the folder, for one that is missing, incomplete or of another format. As everywhere with
    torch.distributed.checkpoint, the metadata is unpickled: open only checkpoints that you trust.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._experts: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._lengths: dict[Path, int] = {}
        try:
            described = parse_json((self.folder / "metadata.json").read_text())
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not valid JSON"
            raise ConvertError(
                f"{self.folder / 'metadata.json'}: cannot be read: {why}. Fix: give the folder of a torch_dist checkpoint"
            ) from error
        if not isinstance(described, dict) or described.get("sharded_backend") != FORMAT["sharded_backend"]:
            raise ConvertError(
                f"{self.folder / 'metadata.json'}: is not of a torch_dist checkpoint. Fix: give the folder of one"
            )
        if not (self.folder / ".metadata").exists():
            raise ConvertError(
                f"{self.folder / '.metadata'}: is missing, so the checkpoint is incomplete. {_COPY_AGAIN}"
            )
        with self._interpreted():
            self.metadata = FileSystemReader(self.folder).read_metadata()
            self._tensors = {
                key: stored
                for key, stored in self.metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            }

    def architecture(self) -> Architecture:
        """From hf/config.json. Raises ConvertError."""
        if not (self.folder / HF_ASSETS).is_dir():
            raise ConvertError(
                f"{self.folder / HF_ASSETS}: is missing, so nothing says what model this is. "
                f"Fix: put the HF model's config.json and tokenizer files there"
            )
        return Architecture.from_hf(self.folder / HF_ASSETS)

    def dtype(self, architecture: Architecture) -> torch.dtype:
        """Of all weights, which check() has found to be the same."""
        return self._tensors[next(iter_parameters(architecture)).key].properties.dtype

    def check(self, architecture: Architecture) -> None:
        """Raises ConvertError unless exactly the parameters of the architecture are there, whole, in one dtype.

        The files are looked at as far as their lengths. What is not of the model, as an optimizer's state, may be anything.
        """
        with self._interpreted():
            self._check(architecture)

    def read(self, parameter: Parameter) -> Tensor:
        """The full tensor, without vocabulary padding. Raises ConvertError if a file is missing or damaged."""
        with self._interpreted():
            return self._read(parameter)

    def _check(self, architecture: Architecture) -> None:
        tensors, keys = self._tensors, {}
        for parameter in iter_parameters(architecture):  # one by one: a damaged config.json may ask for any number
            key = parameter.key
            if key in keys:
                continue
            if key not in tensors:
                raise ConvertError(f"{self.folder}: has no parameter {key}. {_ANOTHER_MODEL}")
            stored = tensors[key]
            keys[key] = stored.properties.dtype
            if not _fits(parameter, tuple(stored.size)):
                raise ConvertError(
                    f"{self.folder}: {key} has shape {list(stored.size)}, but {architecture.name} as configured "
                    f"has {list(parameter.stored_shape)}. {_ANOTHER_MODEL}"
                )
            for chunk in stored.chunks:
                place = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
                if any(offset < 0 or size < 0 or offset + size > total for offset, size, total in place):
                    raise ConvertError(
                        f"{self.folder / '.metadata'}: is damaged: {key} has a chunk beyond its shape. {_COPY_AGAIN}"
                    )
            sizes = {chunk.offsets: chunk.sizes.numel() for chunk in stored.chunks}
            if sum(sizes.values()) < stored.size.numel():
                raise ConvertError(f"{self.folder}: {key} is incomplete: some of its chunks are missing. {_COPY_AGAIN}")
            for chunk in stored.chunks:
                self._check_length(key, chunk)
        dtypes = {dtype: key for key, dtype in keys.items()}
        if len(dtypes) > 1:
            examples = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
            raise ConvertError(f"{self.folder}: weights of several dtypes ({examples}). Fix: save the model in one")
        if not dtypes.keys() <= set(DTYPES.values()):
            raise ConvertError(
                f"{self.folder}: weights are {next(iter(dtypes))}; only {DTYPE_LIST} are supported. Fix: save it in one"
            )
        layers = f"decoder.layers.{architecture.num_layers}."
        if any(key.startswith(layers) for key in tensors):
            raise ConvertError(
                f"{self.folder}: has more than num_hidden_layers = {architecture.num_layers} layers. {_ANOTHER_MODEL}"
            )
        for key in sorted(tensors.keys() - keys.keys()):
            if key.startswith(("embedding.", "decoder.", "output_layer.")):
                raise ConvertError(
                    f"{self.folder}: {key} is no parameter of {architecture.name} as configured. {_ANOTHER_MODEL}"
                )

    def _read(self, parameter: Parameter) -> Tensor:
        stored = self._tensors[parameter.key]
        if parameter.expert is None:
            chunks, shape = stored.chunks, stored.size
        else:
            chunks, shape = self._chunks_by_expert(parameter.key)[parameter.expert], stored.size[1:]
        if len(chunks) == 1:
            return self._read_chunk(parameter, chunks[0])[: parameter.shape[0]]
        full = torch.empty(shape, dtype=stored.properties.dtype)
        for chunk in chunks:
            place = list(zip(chunk.offsets, chunk.sizes, strict=True))[0 if parameter.expert is None else 1 :]
            full[tuple(slice(offset, offset + size) for offset, size in place)] = self._read_chunk(parameter, chunk)
        return full[: parameter.shape[0]]

    @contextmanager
    def _interpreted(self) -> Iterator[None]:
        """A damaged pickle may give anything, and so may what is done with it raise."""
        path = self.folder / ".metadata"
        try:
            yield
        except ConvertError:
            raise
        except OSError as error:
            raise ConvertError(
                f"{error.filename or path}: {error.strerror}. Fix: see to its permissions and the disk"
            ) from error
        except Exception as error:
            raise ConvertError(f"{path}: is damaged ({type(error).__name__}). {_COPY_AGAIN}") from error

    def _chunks_by_expert(self, key: str) -> dict[int, list[ChunkStorageMetadata]]:
        if key not in self._experts:
            by_expert = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                for expert in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    by_expert[expert].append(chunk)
            self._experts[key] = by_expert
        return self._experts[key]

    def _check_length(self, key: str, chunk: ChunkStorageMetadata) -> None:
        info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.folder / info.relative_path
        if path not in self._lengths:
            self._lengths[path] = path.stat().st_size if path.is_file() else -1
        if self._lengths[path] < info.offset + info.length:
            raise ConvertError(f"{path}: {key} cannot be read; the file is missing or truncated. {_COPY_AGAIN}")

    def _read_chunk(self, parameter: Parameter, chunk: ChunkStorageMetadata) -> Tensor:
        """The chunk, or the expert in it."""
        info = self.metadata.storage_data[MetadataIndex(parameter.key, chunk.offsets)]
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                section = io.BufferedReader(_Section(file, info.offset, info.length))
                tensor = torch.load(section, map_location="cpu", weights_only=True)
        except Exception as error:
            if isinstance(error, OSError) and error.filename:  # could not be opened; what is in it is another matter
                raise
            raise ConvertError(f"{path}: {parameter.key} cannot be read; the file is damaged. {_COPY_AGAIN}") from error
        dtype = self._tensors[parameter.key].properties.dtype
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, dtype):
            found = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConvertError(
                f"{path}: {parameter.key} has a chunk {found}, not {list(chunk.sizes)} {dtype} as .metadata says. {_COPY_AGAIN}"
            )
        return tensor if parameter.expert is None else tensor[parameter.expert - chunk.offsets[0]]


def _fits(parameter: Parameter, shape: Shape) -> bool:
    if isinstance(parameter.layout, Vocabulary):  # saved as it was trained, padded to a multiple of TP
        return shape[1:] == parameter.shape[1:] and shape[0] >= parameter.shape[0]
    return shape == parameter.stored_shape


def write_megatron_checkpoint(folder: Path, tensors: Iterable[tuple[Parameter, Tensor]]) -> None:
    """Writes full tensors to an empty folder, as they come, in files of MAX_FILE_BYTES and a tensor at most."""
    metadata = Metadata({}, planner_data={}, storage_data={}, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with ExitStack() as open_files:
        file: DurableFile | None = None
        num_files = 0
        for parameter, tensor in tensors:
            if file is None or file.tell() >= MAX_FILE_BYTES:
                open_files.close()
                file = open_files.enter_context(DurableFile(folder / f"__0_{num_files}.distcp"))
                num_files += 1
            chunk = tensor if parameter.expert is None else tensor[None]
            start, origin = file.tell(), torch.Size([parameter.expert or 0] + [0] * (chunk.dim() - 1))
            _save_tensor(chunk.contiguous(), file)
            stored = metadata.state_dict_metadata.setdefault(
                parameter.key,
                TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(parameter.stored_shape), []),
            )
            assert isinstance(stored, TensorStorageMetadata)
            stored.chunks.append(ChunkStorageMetadata(offsets=origin, sizes=chunk.shape))
            info = _StorageInfo(file.path.name, start, file.tell() - start)
            metadata.storage_data[MetadataIndex(parameter.key, origin)] = info
    common = io.BytesIO()
    torch.save({}, common)
    files = {"common.pt": common.getvalue(), ".metadata": pickle.dumps(metadata)}
    for name, content in {**files, "metadata.json": json.dumps(FORMAT).encode()}.items():
        with DurableFile(folder / name) as small:
            small.write(content)


def _save_tensor(tensor: Tensor, file: DurableFile) -> None:
    """torch.save, without a copy and without the checksum of the bytes, which torch.load does not look at."""
    around = _AroundTensor()
    with torch.serialization.skip_data():
        # A tensor of its own, as torch.save writes all of a view's storage. Its memory is never touched.
        torch.save(torch.empty_like(tensor), around)  # type: ignore[arg-type]
    before, after = around.parts
    file.write(bytes(before))
    file.write(tensor)
    file.write(bytes(after))


class _AroundTensor:
    """Takes what torch.save writes before and after a tensor's bytes. Under skip_data it only seeks beyond these."""

    def __init__(self) -> None:
        self.parts = [bytearray()]

    def write(self, data: bytes) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        assert whence == os.SEEK_CUR
        self.parts.append(bytearray())

    def flush(self) -> None: ...


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
