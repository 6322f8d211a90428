"""Recorded rollouts: one JSON-lines file a step, and the source that plays them back.

The first line says what follows: {"format": 2, "step": 7, "groups": 128, "counts": {...}, "seconds": {...}, "data_position": 896}; then comes a
line a group, with the fields of datatypes.Group. Python writes the shortest decimal that reads back to the same float,
so replayed rewards and log-probs are bitwise those of the recording.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_gppo.datatypes import Group, Prompt, Response, Rollout, Verdict
from megatron_gppo.rollout.generate import RolloutCancelled, RolloutError, RolloutSource

FORMAT = 2


class RecordingRollouts:
    """Passes rollouts on from another source, and writes each to a folder first. See RolloutSource."""

    def __init__(self, source: RolloutSource, folder: Path) -> None:
        self._source = source
        self._folder = folder

    def next(self, step: int, policy_version: int) -> Rollout:
        """As the source's; also raises OSError when the file cannot be written."""
        rollout = self._source.next(step, policy_version)
        write_rollout(self._folder, step, rollout)
        return rollout

    def cancel(self) -> None:
        self._source.cancel()


class ReplayRollouts:
    """Plays back the rollouts that RecordingRollouts wrote to a folder. See RolloutSource."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cancelled = False

    def next(self, step: int, policy_version: int) -> Rollout:
        """The recorded rollout; policy_version is not compared, so that other trainers can be tried on it.

        Raises RolloutError when the step was not recorded or its file is damaged, and RolloutCancelled.
        """
        if self._cancelled:
            raise RolloutCancelled
        return read_rollout(self._folder, step)

    def cancel(self) -> None:
        self._cancelled = True


def write_rollout(folder: Path, step: int, rollout: Rollout) -> None:
    """Writes a step's file, replacing an older one as a whole. Raises OSError with folder and fix."""
    header = {
        "format": FORMAT,
        "step": step,
        "groups": len(rollout.groups),
        "counts": rollout.counts,
        "seconds": rollout.seconds,
        "data_position": rollout.data_position,
    }
    path = _path(folder, step)
    unfinished = path.with_suffix(".unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for record in (header, *map(dataclasses.asdict, rollout.groups)):
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: the rollout cannot be recorded. Fix: make room there, or change rollout.record",
            str(path),
        ) from error


def read_rollout(folder: Path, step: int) -> Rollout:
    """Raises RolloutError when the file is missing or damaged."""
    path = _path(folder, step)
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")[:-1]
        fields = json.loads(header)
        if fields["format"] != FORMAT:
            raise RolloutError(f"{path}: format {fields['format']}, this version reads {FORMAT}. Fix: record it anew")
        groups = [_group(json.loads(line)) for line in lines]
        if len(groups) != fields["groups"]:
            raise RolloutError(f"{path}: holds {len(groups)} of {fields['groups']} groups. Fix: record it anew")
        return Rollout(groups, fields["counts"], fields["seconds"], fields["data_position"])
    except FileNotFoundError:
        raise RolloutError(_not_recorded(folder, step)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"{path}: damaged ({type(error).__name__}: {error}). Fix: record it anew") from error


def _group(fields: dict[str, Any]) -> Group:
    return Group(
        Prompt(**fields["prompt"]),
        [Response(**response) for response in fields["responses"]],
        [Verdict(**verdict) for verdict in fields["verdicts"]],
    )


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"


def _not_recorded(folder: Path, step: int) -> str:
    recorded = sorted(path.name for path in folder.glob("step_*.jsonl"))
    there = f"has {recorded[0]} to {recorded[-1]}" if recorded else "has no recorded steps"
    return f"step {step} is not recorded: rollout.replay = {folder} {there}. Fix: lower train.steps, or record more"
