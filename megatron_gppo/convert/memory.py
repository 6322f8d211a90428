"""The bytes of tensors."""

import torch
from torch import Tensor

_SAME_SIZE = {2: torch.int16, 4: torch.int32}


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place. NumPy has no bfloat16, hence by way of uint8."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and finds NaN equal to itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = _SAME_SIZE[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; in one pass, and without a mask of its size."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
