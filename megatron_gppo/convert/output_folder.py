"""A folder that appears under its name only when it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_gppo.convert.errors import ConvertError


@contextlib.contextmanager
def output_folder(path: str | Path, source: Path, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, renamed to `path` when the body ends well and removed when it does not.

    Raises ConvertError if `path` holds anything (unless `overwrite`), if it is or holds `source`, if fewer than
    `num_bytes` are free on its disk, and for what the operating system refuses while the body runs.
    """
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        if path.exists() and not path.is_dir():
            raise ConvertError(f"{path}: is a file. Fix: give a new folder")
        if source.resolve().is_relative_to(path):
            raise ConvertError(f"{path}: holds the source. Fix: give another folder")
        if path.exists() and any(path.iterdir()) and not overwrite:
            raise ConvertError(f"{path}: is not empty. Fix: give a new folder, or --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise ConvertError(
                f"{path}: needs {num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on its disk"
            )
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _replace(path, partial)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise ConvertError(f"{error.filename or path}: {error.strerror}. {path} is as it was") from error


def _replace(path: Path, partial: Path) -> None:
    """Renames `partial` to `path`; what was there is removed last, or put back."""
    if not path.exists():
        partial.rename(path)
        return
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable; the files sync themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
