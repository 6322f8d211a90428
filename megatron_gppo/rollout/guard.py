"""Keeps an SGLang server from outliving the trainer: run as a script, it starts the server and ends it.

    python guard.py PARENT_PID GRACE_SECONDS COMMAND...

It ends the server, children included, when its stdin reaches end of file (the trainer closed it, or is gone for
whatever reason, SIGKILL included), when its parent is no longer PARENT_PID (a forked child of the trainer may hold the
pipe open longer than the trainer lives), or on SIGTERM. The server gets SIGTERM and GRACE_SECONDS; then everything that
is left gets SIGKILL. When the server ends by itself, what it left behind is killed at once. The exit status is the
server's (128 + n for signal n). Should the guard itself be killed, the kernel kills the server, and SGLang's
processes follow their parent.

Standard library only, and no import of megatron_gppo: it must start at once and stay small. Linux only.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.25
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None)


def main(parent: int, grace_seconds: float, command: list[str]) -> int:
    stop_requested = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop_requested
        stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Processes whose parent dies become children of this one, whatever process group or session they moved to:
    # killing this process's children until there are none leaves nothing behind.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard, process_group=0)

    while (status := _reap(server.pid)) is None:
        trainer_is_gone = os.getppid() != parent or _end_of_file()
        if stop_requested or trainer_is_gone:
            _log(f"ending the server; the trainer {'is gone' if trainer_is_gone else 'asked for it'}")
            return _end(server.pid, grace_seconds)
    _log(f"the server ended with status {_exit_code(status)}")
    _kill_children()
    return _exit_code(status)


def _die_with_guard() -> None:
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _log(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not keep the guard from its work
        print(f"guard: {line}", flush=True)


def _end_of_file() -> bool:
    """Waits POLL_SECONDS for stdin."""
    readable, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(readable) and not os.read(0, 1024)


def _end(server: int, grace_seconds: float) -> int:
    # SIGTERM to SGLang's main process only: it stops its own children, and takes their death for a crash.
    os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while (status := _reap(server)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill_children()
    return _exit_code(status) if status is not None else 128 + signal.SIGKILL


def _reap(server: int) -> int | None:
    """Collects every child that ended; returns the server's wait status once it did."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == server:
            return status
        if pid == 0:
            return None


def _kill_children() -> None:
    while True:
        for child in _children():
            os.kill(child, signal.SIGKILL)  # not yet reaped, so the number cannot belong to another process
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name in parentheses may hold anything
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            children.append(int(stat.parent.name))
    return children


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
