"""Every judged response on disk as soon as its problem is done, so that an interrupted evaluation goes on there.

An evaluation's folder holds settings.json (what the records depend on), BENCHMARK.jsonl with a line a problem, and at
the end report.json and report.md.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gppo.datatypes import Group
from megatron_gppo.rollout.answers import last_boxed

SETTINGS = "settings.json"


class EvaluationError(RuntimeError):
    """An evaluation's files cannot be written or read. The message names the file and the fix."""


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """What k responses to a problem were worth."""

    row: int  # Prompt.row
    correct: list[bool]  # [k], like those below
    answers: list[str | None]  # what was judged, or the last \boxed{}
    outcomes: list[str]
    truncated: list[bool]
    num_tokens: list[int]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


class Records:
    """The results of one evaluation, by benchmark and row; add() keeps them on disk."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], benchmarks: list[str]) -> None:
        """Reads what is there. Records made with other settings are of no use, and are deleted.

        Raises EvaluationError when the folder cannot be used.
        """
        self._folder = folder
        self.results: dict[str, dict[int, ProblemResult]] = {name: {} for name in benchmarks}
        try:
            if folder.exists() and not (folder / SETTINGS).exists() and any(folder.iterdir()):
                raise EvaluationError(f"{folder} is not an evaluation's folder. Fix: move it away, or change run.dir")
            if (folder / SETTINGS).exists() and not made_with(folder, settings):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(_text(settings))
            for name in benchmarks:
                self._read(name)
        except OSError as error:
            raise EvaluationError(f"{folder}: {error.strerror}. Fix: give a run.dir that can be written") from error

    def add(self, benchmark: str, group: Group) -> None:
        """Raises EvaluationError when the file cannot be written."""
        line = json.dumps(_line(group)) + "\n"
        path = self._path(benchmark)
        try:
            with path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise EvaluationError(
                f"{path}: {error.strerror}. Fix: make room there; the same command goes on"
            ) from error
        self.results[benchmark][group.prompt.row] = _result(json.loads(line))

    def _read(self, benchmark: str) -> None:
        path = self._path(benchmark)
        if not path.exists():
            return
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):  # the line that was being written
            path.write_bytes(complete)
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                result = _result(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{path}, line {number}: damaged ({error}). Fix: delete the file") from error
            self.results[benchmark][result.row] = result

    def _path(self, benchmark: str) -> Path:
        # A data_source may be any text.
        return self._folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', benchmark)}.jsonl"


def made_with(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder's records depend on exactly these settings."""
    path = folder / SETTINGS
    return path.exists() and path.read_text() == _text(settings)


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _line(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    responses = [
        {
            "text": response.text,
            "tokens": len(response.token_ids),
            "truncated": response.truncated,
            "correct": verdict.correct,
            "reward": verdict.reward,
            "outcome": verdict.outcome,
            "answer": verdict.answer if verdict.answer is not None else last_boxed(response.text),
        }
        for response, verdict in zip(group.responses, group.verdicts, strict=True)
    ]
    return {
        "row": prompt.row,
        "data_source": prompt.data_source,
        "prompt": prompt.text,
        "ground_truth": prompt.ground_truth,
        "responses": responses,
    }


def _result(line: dict[str, Any]) -> ProblemResult:
    responses = line["responses"]
    return ProblemResult(
        row=line["row"],
        correct=[response["correct"] for response in responses],
        answers=[response["answer"] for response in responses],
        outcomes=[response["outcome"] for response in responses],
        truncated=[response["truncated"] for response in responses],
        num_tokens=[response["tokens"] for response in responses],
    )
