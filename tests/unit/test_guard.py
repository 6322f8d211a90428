"""The guard ends a whole tree of processes, however it is told to, and whatever they do against it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_gppo.rollout import guard
from tests.support.rollout import processes_below, wait_gone

# A server that ignores SIGTERM, with a child in a session of its own and a grandchild whose parent is gone.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
if (parent := os.fork()) == 0:
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    os._exit(0)
os.waitpid(parent, 0)
print("up", flush=True)
time.sleep(600)
"""
# A trainer that starts the guard and forks a child, which holds the guard's stdin open after it.
TRAINER = """
import os, subprocess, sys, time
guard = subprocess.Popen(
    [sys.executable, sys.argv[1], str(os.getpid()), "0.5", sys.executable, "-c", sys.argv[2]],
    stdin=subprocess.PIPE, start_new_session=True)
print(guard.pid, flush=True)
if os.fork() == 0:
    time.sleep(5)
    os._exit(0)
time.sleep(600)
"""


def start(code: str, grace_seconds: float = 0.5) -> "subprocess.Popen[str]":
    command = [sys.executable, guard.__file__, str(os.getpid()), str(grace_seconds), sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def started_stubborn() -> "tuple[subprocess.Popen[str], list[int]]":
    process = start(STUBBORN)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process, tree_below(process.pid)


def tree_below(guard_pid: int) -> list[int]:
    """The guard, the server, its child and grandchild, and the orphan that the guard adopted."""
    deadline = time.monotonic() + 60
    while len(pids := processes_below(guard_pid)) != 5:
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)
    return pids


@pytest.mark.parametrize("how", ["end of file", "SIGTERM", "SIGKILL to the server"])
def test_nothing_survives(how: str) -> None:
    process, pids = started_stubborn()
    if how == "end of file":
        assert process.stdin is not None
        process.stdin.close()
    elif how == "SIGTERM":
        process.terminate()
    else:
        server = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(server, signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert wait_gone(pids, 30) == []


def test_nothing_survives_a_killed_trainer() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, guard.__file__, STUBBORN], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    pids = tree_below(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait()
    assert wait_gone(pids, 60) == []


def test_the_server_dies_with_a_killed_guard() -> None:
    process = start("import time; print('up', flush=True); time.sleep(600)")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    pids = processes_below(process.pid)
    assert len(pids) == 2
    process.kill()
    process.wait()
    assert wait_gone(pids, 30) == []


def test_sigterm_is_enough_for_a_server_that_obeys() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    process = start(code, grace_seconds=60)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.wait(50) == 7


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.abort()", 128 + signal.SIGABRT)]
)
def test_reports_how_the_server_ended(code: str, status: int) -> None:
    assert start(code).wait(60) == status


def test_terminal_interrupts_do_not_reach_the_server() -> None:
    process, pids = started_stubborn()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(1.0)
    assert process.poll() is None
    process.terminate()
    process.wait(60)
    assert wait_gone(pids, 30) == []
