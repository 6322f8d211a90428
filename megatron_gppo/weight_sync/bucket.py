"""A flattened bucket: HF tensors one behind the other in one buffer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """HF tensors, one behind the other in one buffer.

    Example. Two bf16 tensors "a" [2, 3] and "b" [4] make names ["a", "b"], shapes [(2, 3), (4,)] and 20 bytes of data.
    """

    names: list[str]
    shapes: list[Shape]
    dtype: torch.dtype  # of every tensor
    data: Tensor  # [bytes] uint8

    @classmethod
    def flatten(cls, tensors: Sequence[tuple[str, Tensor]], dtype: torch.dtype, buffer: Tensor) -> "Bucket":
        """Copies the tensors, cast to `dtype`, to the start of `buffer`, [bytes] uint8 and large enough."""
        names = [name for name, _ in tensors]
        shapes = [tuple(tensor.shape) for _, tensor in tensors]
        data = buffer[: num_bytes(shapes, dtype)]
        torch._foreach_copy_(unflatten(data, shapes, dtype), [tensor for _, tensor in tensors])
        return cls(names, shapes, dtype, data)

    def tensors(self) -> dict[str, Tensor]:
        """Views of `data` by HF name."""
        return dict(zip(self.names, unflatten(self.data, self.shapes, self.dtype), strict=True))


def num_bytes(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes)


def unflatten(data: Tensor, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Views of [bytes] uint8, which they fill exactly."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [flat.view(shape) for flat, shape in zip(data.view(dtype).split(sizes), shapes, strict=True)]
