"""Checks of what callers pass in. Each raises ValueError, naming the input."""

from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def needed(value: T | None, name: str, setting: str) -> T:
    """An optional input that a setting of the config cannot do without."""
    if value is None:
        raise ValueError(f"{name} is missing, and {setting} needs it. Fix: pass {name}")
    return value


def check_lengths(length: int, meaning: str, **tensors: Tensor | None) -> None:
    """Every tensor given is one-dimensional with this length."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}. Fix: pass [{length}], {meaning}")
