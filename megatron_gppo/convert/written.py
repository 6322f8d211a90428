"""The audit of what a conversion has written."""

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch

from megatron_gppo.convert.errors import ConvertError


@contextmanager
def audit() -> Iterator[None]:
    """Whatever does not pass was damaged on its way to the disk, and not by the user."""
    try:
        yield
    except ConvertError as error:
        what, _, _ = str(error).partition(". Fix:")
        raise ConvertError(
            f"what was written is not what was asked for: {what}. Fix: check the disk, and that nothing else writes there"
        ) from error


def check_names(found: Set[str], expected: Set[str]) -> None:
    differing = sorted(found ^ expected)
    if differing:
        state = "is missing" if differing[0] in expected else "is one too many"
        raise ConvertError(f"tensor {differing[0]} {state}. Fix: convert again")


def check_dtype(found: torch.dtype, expected: torch.dtype, where: str) -> None:
    if found != expected:
        raise ConvertError(f"{where} has {found}, not {expected}. Fix: convert again")
