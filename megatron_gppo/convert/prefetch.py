"""Reading ahead: the next tensors are read while the last one is written."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Yields an iterator over `items`, which a thread of its own runs one item ahead: three exist at a time.

    What `items` raises is raised where the item would have come. Leaving the context ends the thread, but does not wait
    for the item that it is at: a disk that hangs must not keep an interrupted run from cleaning up.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    def consume() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        with closing(consume()) as iterator:  # type: ignore[type-var]
            yield iterator
    finally:
        stopped.set()
