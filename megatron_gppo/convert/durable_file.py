"""Files written once, front to back, that are on the disk when they are closed."""

import os
from pathlib import Path
from types import TracebackType

from torch import Tensor

from megatron_gppo.convert.memory import memory_of

# Left to itself the kernel may keep gigabytes in memory and write them while the last fsync waits.
WRITE_BEHIND_BYTES = 64 * 2**20


class DurableFile:
    """A new file. Closing it syncs it; leaving its context by an exception only closes it."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("wb", buffering=0)
        self._started = 0  # bytes that the kernel was asked to write

    def write(self, data: bytes | Tensor) -> None:
        view = memory_of(data) if isinstance(data, Tensor) else memoryview(data)
        while len(view):  # one write is at most 2 GiB
            view = view[self.file.write(view[:WRITE_BEHIND_BYTES]) :]
            self._write_behind()

    def tell(self) -> int:
        return self.file.tell()

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def _write_behind(self) -> None:
        end = self.file.tell()
        if end - self._started >= WRITE_BEHIND_BYTES and hasattr(os, "posix_fadvise"):
            # Starts writing what is dirty, without waiting for it, and forgets what is written.
            os.posix_fadvise(self.file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
            self._started = end
