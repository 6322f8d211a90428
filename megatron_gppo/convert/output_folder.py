"""A folder that appears under its name only when it is complete."""

import contextlib
import errno
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_gppo.convert.errors import ConvertError

logger = logging.getLogger(__name__)


def check_output(path: str | Path, source: Path, num_bytes: int, overwrite: bool = False) -> None:
    """Raises ConvertError unless output_folder would begin to write there."""
    path, source = _resolved(path), source.resolve()
    try:
        if path.exists() and not path.is_dir():
            raise ConvertError(f"{path}: is a file. Fix: give a new folder")
        if os.path.ismount(path):
            raise ConvertError(f"{path}: is a mount point, which no folder can replace. Fix: give a folder in it")
        if source.is_relative_to(path):
            raise ConvertError(f"{path}: holds the source. Fix: give another folder")
        if path.is_relative_to(source):
            raise ConvertError(f"{path}: is inside the source {source}. Fix: give a folder outside it")
        if path.exists() and any(path.iterdir()) and not overwrite:
            raise ConvertError(f"{path}: is not empty. Fix: give a new folder, or --overwrite")
        existing = next(parent for parent in path.parents if parent.exists())
        if not existing.is_dir():
            raise ConvertError(f"{path}: cannot be made, as {existing} is a file. Fix: give a folder elsewhere")
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise ConvertError(
            f"{error.filename or path}: {error.strerror}. Fix: give a folder that can be written"
        ) from error
    if free < num_bytes:
        raise ConvertError(
            f"{path}: needs {num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on its disk. "
            f"Fix: free some, or give a folder on another disk"
        )


@contextlib.contextmanager
def output_folder(path: str | Path, source: Path, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, renamed to `path` when the body ends well and removed when it does not.

    What a killed run left beside `path` is removed first.

    Raises ConvertError if `path` holds anything (unless `overwrite`), if it is, holds or is inside `source`, if it is a
    mount point, if fewer than `num_bytes` are free on its disk, and for what the operating system refuses while the body
    runs. What was at `path` and cannot be removed is left beside it, with a warning. An interruption that comes when
    `path` is complete says so in a note.
    """
    path = _resolved(path)
    made, partial = False, _beside(path, "incomplete")
    try:
        _clean_up_after_killed_runs(path)
        check_output(path, source, num_bytes, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
            made = True
            yield partial
            sync_tree(partial)
            _put_in_place(partial, path, overwrite)
            _sync(path.parent)
            if _beside(path, "replaced").exists():
                _remove(_beside(path, "replaced"))
        except BaseException as error:
            if partial.exists():
                _remove(partial)
            elif made:
                error.add_note(_complete(path))
            raise
    except OSError as error:
        state = f"{path} is complete" if hasattr(error, "__notes__") else f"{path} is as it was"
        raise ConvertError(
            f"{error.filename or path}: {error.strerror}. {state}. Fix: see to the disk and the folder's permissions"
        ) from error


def sync_tree(folder: Path) -> None:
    """Makes a folder durable: files, and the lists of their names."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _resolved(path: str | Path) -> Path:
    loop = f"{path}: is a loop of symbolic links. Fix: give a new folder"
    try:
        resolved = Path(path).resolve()
    except RuntimeError as error:
        raise ConvertError(loop) from error
    except ValueError as error:
        raise ConvertError(f"{str(path)!r}: is no path: {error}. Fix: give the name of a folder") from error
    if os.path.islink(resolved):  # Python 3.13 does not raise
        raise ConvertError(loop)
    return resolved


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f"{_prefix(path, kind)}{os.getpid()}"


def _prefix(path: Path, kind: str) -> str:
    return f".{path.name}.{kind}-{socket.gethostname()}-"


def _complete(path: Path) -> str:
    replaced = _beside(path, "replaced")
    if not replaced.exists():
        return f"{path} is complete"
    return f"{path} is complete, but {replaced}, which it replaced, may be left. Fix: remove that one"


def _put_in_place(partial: Path, path: Path, overwrite: bool) -> None:
    """Renames `partial` to `path`; what was there is then beside it, or put back."""
    if not overwrite:
        try:
            partial.rename(path)  # succeeds onto an empty folder, too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ConvertError(
                f"{path}: files appeared there during the run. Fix: give a new folder, or --overwrite"
            ) from error
        return
    if not path.exists():
        partial.rename(path)
        return
    replaced = _beside(path, "replaced")
    try:
        path.rename(replaced)
        partial.rename(path)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise


def _clean_up_after_killed_runs(path: Path) -> None:
    """Removes their incomplete folders. One that was killed between _put_in_place's two renames has its first one undone."""
    if not path.parent.is_dir():
        return
    for kind in ("replaced", "incomplete"):
        prefix = _prefix(path, kind)
        for leftover in sorted(path.parent.iterdir()):
            pid = leftover.name.removeprefix(prefix)
            if not leftover.name.startswith(prefix) or not pid.isdecimal() or _is_running(int(pid)):
                continue
            if kind == "replaced" and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s: %s, so it is left there. Fix: remove it", folder, error.strerror or error)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
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
