"""What a conversion tells while it runs and when it is done."""

from dataclasses import dataclass
from typing import TypeAlias

from tqdm import tqdm

ProgressBar: TypeAlias = "tqdm[None]"


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion took."""

    num_bytes: int  # of tensors, as written
    seconds: float  # until they were on the disk
    verify_seconds: float | None  # None: was not asked for

    def __str__(self) -> str:
        text = f"{self.num_bytes / 1e9:.2f} GB in {self.seconds:.1f} s ({self.num_bytes / 1e9 / self.seconds:.2f} GB/s)"
        return text if self.verify_seconds is None else f"{text}, verified in {self.verify_seconds:.1f} s"


def progress_bar(num_bytes: int, description: str, shown: bool) -> ProgressBar:
    """To be updated with bytes, and used as a context."""
    return tqdm(
        total=num_bytes,
        desc=description,
        disable=not shown,
        unit="B",
        unit_scale=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left",
    )
