"""Ctrl-C and SIGTERM: finish what must not be cut, save, and leave."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# torchrun passes a terminal's Ctrl-C on to ranks that have received it already, so only a later one is a second one.
SECOND_INTERRUPT_AFTER_S = 2.0


class Interrupts:
    """While the context is open, the first SIGINT or SIGTERM only sets `requested` and calls `on_request`.

    A second Ctrl-C raises KeyboardInterrupt. Enter it in the main thread.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested: signal.Signals | None = None
        self._on_request = on_request
        self._requested_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested = signal.Signals(number)
            self._requested_at = now
            self._on_request()
        elif number == signal.SIGINT and now - self._requested_at > SECOND_INTERRUPT_AFTER_S:
            raise KeyboardInterrupt


def say_interrupted_before_it_began() -> None:
    """From now on Ctrl-C ends the process with one line. For the seconds of imports, some of which turn KeyboardInterrupt
    into other errors.
    """
    signal.signal(signal.SIGINT, _interrupted_before_it_began)


def _interrupted_before_it_began(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted before it began. Fix: run the same command again\n")
    os._exit(128 + number)
