"""Ctrl-C and SIGTERM: finish what must not be cut, save, and leave."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# torchrun passes a terminal's Ctrl-C on to ranks that have received it already, so only a later one is a second one.
SECOND_INTERRUPT_AFTER_S = 2.0


class Interrupts:
    """While the context is open, the first SIGINT or SIGTERM only sets `requested` and calls `on_request`, in a thread.

    That happens at once; `requested` is set when the main thread returns to Python, which a collective that waits for rank 0's
    rollout does not. A second Ctrl-C raises KeyboardInterrupt. Enter it in the main thread.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested: signal.Signals | None = None
        self._on_request = on_request
        self._requested_at = 0.0
        self._before: dict[int, Any] = {}
        self._arrived, self._arriving = os.pipe()
        self._thread = threading.Thread(target=self._await_signal, name="interrupts", daemon=True)

    def __enter__(self) -> "Interrupts":
        self._thread.start()
        os.set_blocking(self._arriving, False)
        signal.set_wakeup_fd(self._arriving, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._arriving)
        self._thread.join()
        os.close(self._arrived)

    def _await_signal(self) -> None:
        """Every signal that has a handler in Python arrives as a byte."""
        while number := os.read(self._arrived, 1):
            if number[0] in self._before:
                self._on_request()
                return

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested = signal.Signals(number)
            self._requested_at = now
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
