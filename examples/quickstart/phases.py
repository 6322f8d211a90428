"""Runs a recipe's commands one after another, remembers which are done, and ends what is running on Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

STOP_TIMEOUT_S = 60.0  # for the trainer to save a checkpoint and to stop its server
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # ranks and server share the cores; more threads would only wait for each other
    "HF_HUB_OFFLINE": "1",  # everything is made here, so nothing may wait for a network
    "PYTHONUNBUFFERED": "1",
}


class PhaseError(Exception):
    """The recipe cannot go on. The message says why and what to do."""


class Phases:
    """The phases of one run, recorded in FOLDER/phases.json so that the same call later goes on where this one stops."""

    def __init__(self, folder: Path, settings: dict[str, Any], console: Console) -> None:
        """Raises PhaseError if the folder holds a run with other settings."""
        self.seconds: dict[str, float] = {}  # by phase; of an interrupted one, so far
        self._done: list[str] = []
        self._settings = settings
        self._console = console
        self._record = record_path(folder)
        if self._record.exists():
            recorded = json.loads(self._record.read_text())
            if recorded["settings"] != settings:
                raise PhaseError(
                    f"{folder} holds a run with other settings. Fix: --fresh to delete it, or another --dir"
                )
            self._done, self.seconds = recorded["done"], recorded["seconds"]
            console.print(f"Going on with the run in {folder} (--fresh would delete it and start anew)")
        folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def run(self, name: str, command: list[str]) -> None:
        """Runs the command unless it is done. Raises PhaseError when it fails, KeyboardInterrupt when interrupted."""
        if name in self._done:
            self._console.print(f"[green]done[/]  {name}")
            return
        self._console.rule(f"[bold]{name}", align="left")
        self._console.print(f"[dim]{shlex.join(command)}", soft_wrap=True)
        started = time.monotonic()
        try:
            exit_code = _call(command)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self._save()
        if exit_code:
            raise PhaseError(f"{name}: exit code {exit_code}, see above. The same call goes on from here.")
        self._done.append(name)
        self._save()

    def _save(self) -> None:
        record = {"settings": self._settings, "done": self._done, "seconds": self.seconds}
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(self._record)


def record_path(folder: Path) -> Path:
    """The file that marks a folder as a run of ours."""
    return folder / "phases.json"


def interrupt_on_signals() -> None:
    """Makes SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does; also where a shell had it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _call(command: list[str]) -> int:
    """The command's exit code. On KeyboardInterrupt its processes are ended first."""
    # In a session of its own, so that the terminal's Ctrl-C reaches it once, from _stop, and not a second time:
    # torchrun and the trainer take a second one as an order to drop everything.
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for left in [*psutil.Process(process.pid).children(recursive=True), process]:
            left.kill()
        process.wait()
