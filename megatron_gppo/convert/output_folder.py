"""A folder that appears under its name only when it is complete."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_gppo.convert.errors import ConvertError


def check_output(path: str | Path, source: Path, num_bytes: int, overwrite: bool = False) -> None:
    """Raises ConvertError unless output_folder would begin to write there."""
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ConvertError(f"{path}: is a file. Fix: give a new folder")
    if source.resolve().is_relative_to(path):
        raise ConvertError(f"{path}: holds the source. Fix: give another folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ConvertError(f"{path}: is not empty. Fix: give a new folder, or --overwrite")
    existing = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ConvertError(f"{path}: needs {num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on its disk")


@contextlib.contextmanager
def output_folder(path: str | Path, source: Path, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, renamed to `path` when the body ends well and removed when it does not.

    What a killed run left beside `path` is removed first.

    Raises ConvertError if `path` holds anything (unless `overwrite`), if it is or holds `source`, if fewer than
    `num_bytes` are free on its disk, and for what the operating system refuses while the body runs.
    """
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.incomplete-{socket.gethostname()}-{os.getpid()}")
    try:
        _clean_up_after_killed_runs(path)
        check_output(path, source, num_bytes, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
            yield partial
            sync_tree(partial)
            _replace(path, partial)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise ConvertError(f"{error.filename or path}: {error.strerror}. {path} is as it was") from error


def sync_tree(folder: Path) -> None:
    """Makes a folder durable: files, and the lists of their names."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _replace(path: Path, partial: Path) -> None:
    """Renames `partial` to `path`; what was there is removed last, or put back."""
    if not path.exists():
        partial.rename(path)
        return
    replaced = path.with_name(partial.name.replace(".incomplete-", ".replaced-"))
    path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def _clean_up_after_killed_runs(path: Path) -> None:
    """Removes their incomplete folders. One that was killed between _replace's two renames has its first one undone."""
    for kind in ("replaced", "incomplete"):
        prefix = f".{path.name}.{kind}-{socket.gethostname()}-"
        for leftover in path.parent.glob(f"{prefix}*"):
            if _is_running(leftover.name.removeprefix(prefix)):
                continue
            if kind == "replaced" and not path.exists():
                leftover.rename(path)
            else:
                shutil.rmtree(leftover)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
