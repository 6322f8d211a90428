"""Writing the weights of an HF folder: safetensors, one file or shards with an index.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. So the header,
which needs only names and shapes, comes first, and tensors follow as they come.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_gppo.convert.durable_file import DurableFile
from megatron_gppo.convert.hf_checkpoint import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_gppo.convert.layout import Shape

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9


def write_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    tensors: Iterator[Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors that come in the order of `shapes`, each whole or as consecutive parts.

    One file where they fit in max_shard_bytes, else shards of at most that (or one tensor) with an index.
    """
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += num_bytes

    if len(shards) == 1:
        files = [SINGLE_FILE]
    else:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype, tensors)
    if len(shards) > 1:
        with DurableFile(folder / INDEX_FILE) as index_file:
            index_file.write(weights_index(dict(zip(files, shards, strict=True)), dtype))


def safetensors_header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """What a file begins with; then come the tensors' bytes, in the order of `shapes`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors start aligned
    return len(encoded).to_bytes(8, "little") + encoded


def weights_index(files: Mapping[str, Mapping[str, Shape]], dtype: torch.dtype) -> bytes:
    """The index of a folder with several files, from the tensors in each."""
    shapes = [shape for file in files.values() for shape in file.values()]
    index = {
        "metadata": {"total_size": sum(math.prod(shape) for shape in shapes) * dtype.itemsize},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _write_file(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    with DurableFile(path) as file:
        file.write(safetensors_header(shapes, dtype))
        for shape in shapes.values():
            missing = math.prod(shape)
            while missing:
                tensor = next(tensors)
                assert tensor.dtype == dtype
                file.write(tensor.contiguous())
                missing -= tensor.numel()
            assert missing == 0
