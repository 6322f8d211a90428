"""What an evaluation found, for machines (JSON), for people (Markdown, console) and for curves (TensorBoard)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from megatron_gppo.evaluate.benchmarks import Benchmark
from megatron_gppo.evaluate.records import EvaluationError, ProblemResult
from megatron_gppo.evaluate.statistics import Estimate, estimate, majority_correct, pass_at

FORMAT = 1
REPORT = "report.json"
MARKDOWN = "report.md"


@dataclass(frozen=True, slots=True)
class Score:
    """A model on a benchmark."""

    problems: int
    samples: int  # k
    temperature: float
    top_p: float
    max_response_tokens: int
    avg: Estimate  # avg@k: share of correct responses
    pass_at: dict[int, Estimate]  # by number of tries: 1, 2, 4, ... and k
    majority: Estimate | None  # maj@k; None where no response has an answer that could be compared
    truncated: float  # share of responses that reached max_response_tokens
    mean_response_tokens: float
    outcomes: dict[str, int]  # Verdict.outcome of all responses
    left_out: dict[str, int]  # rows that were not evaluated, by reason
    accuracies: dict[str, float]  # of each problem, by Benchmark.keys


@dataclass(frozen=True, slots=True)
class Report:
    """All benchmarks of one evaluation."""

    model: str
    scores: dict[str, Score]
    counts: dict[str, int]  # events by name, as in datatypes.Rollout, of the last call
    seconds: dict[str, float]  # likewise

    @property
    def average(self) -> float:
        """Mean of the benchmarks' avg@k, as the paper's tables have it."""
        return float(np.mean([score.avg.mean for score in self.scores.values()]))


def score(benchmark: Benchmark, results: Mapping[int, ProblemResult]) -> Score:
    """results: by row, all of the benchmark's problems."""
    of_problems = [results[prompt.row] for prompt in benchmark.prompts]
    k = benchmark.samples
    tries = sorted({k, *(2**power for power in range(k.bit_length()))})
    has_answers = any(answer is not None for result in of_problems for answer in result.answers)
    majorities = [majority_correct(result.correct, result.answers) for result in of_problems]
    return Score(
        problems=len(of_problems),
        samples=k,
        temperature=benchmark.sampling.temperature,
        top_p=benchmark.sampling.top_p,
        max_response_tokens=benchmark.sampling.max_response_tokens,
        avg=estimate([result.accuracy for result in of_problems]),
        pass_at={
            count: estimate([pass_at(count, k, sum(result.correct)) for result in of_problems]) for count in tries
        },
        majority=estimate(majorities) if has_answers else None,
        truncated=float(np.mean([result.truncated for result in of_problems])),
        mean_response_tokens=float(np.mean([result.num_tokens for result in of_problems])),
        outcomes=dict(Counter(outcome for result in of_problems for outcome in result.outcomes)),
        left_out=dict(benchmark.left_out),
        accuracies={key: result.accuracy for key, result in zip(benchmark.keys, of_problems, strict=True)},
    )


def write_report(folder: Path, report: Report) -> None:
    """report.json and report.md. Raises EvaluationError."""
    written = {"format": FORMAT, "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    try:
        (folder / MARKDOWN).write_text(markdown(report))
        # Last, and as a whole: where it is, the evaluation is complete.
        partial = folder / f".{REPORT}.partial"
        partial.write_text(json.dumps({**written, **asdict(report), "average": report.average}, indent=2) + "\n")
        partial.replace(folder / REPORT)
    except OSError as error:
        raise EvaluationError(f"{folder}: {error.strerror}. Fix: make room there") from error


def read_report(path: Path) -> Report:
    """From a report.json or the folder that has one. Raises EvaluationError."""
    path = path / REPORT if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
        if fields["format"] != FORMAT:
            raise EvaluationError(f"{path}: format {fields['format']}, this version reads {FORMAT}. Fix: evaluate anew")
        scores = {name: _score_from(of_one) for name, of_one in fields["scores"].items()}
        return Report(fields["model"], scores, fields["counts"], fields["seconds"])
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}. Fix: name an evaluation's folder or report.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not a report ({type(error).__name__}: {error}). Fix: evaluate anew") from error


def console_table(report: Report) -> Table:
    """A line a benchmark, and the average of several."""
    # Narrow enough for the 80 columns that output without a terminal has.
    table = Table(
        title=f"{report.model}: accuracy in %, with 95% confidence intervals over problems",
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headings, *rows = _cells(report)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "benchmark" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(report: Report) -> str:
    """The same as a document."""
    headings, *rows = _cells(report)
    lines = [
        f"# Evaluation of {report.model}",
        "",
        "Accuracy in %, with 95% confidence intervals over problems.",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    for name, of_one in report.scores.items():
        curve = ", ".join(f"pass@{count} {100 * found.mean:.1f}" for count, found in of_one.pass_at.items())
        unusual = {**{k: v for k, v in of_one.outcomes.items() if k != "scored"}, **of_one.left_out}
        lines.append(
            f"- **{name}**: {curve}; temperature {of_one.temperature:g}, top-p {of_one.top_p:g}, at most "
            f"{of_one.max_response_tokens:,} tokens" + "".join(f"; {v} {k}" for k, v in sorted(unusual.items()))
        )
    return "\n".join(lines) + "\n"


def scalars(report: Report) -> dict[str, float]:
    """TensorBoard's, as metrics.TAGS documents them."""
    found = {"eval/average": report.average, "eval/seconds": report.seconds["total"]}
    for name, of_one in report.scores.items():
        values = {
            "accuracy": of_one.avg.mean,
            "pass": of_one.pass_at[of_one.samples].mean,
            "majority": of_one.majority.mean if of_one.majority is not None else None,
            "truncated_share": of_one.truncated,
            "tokens_mean": of_one.mean_response_tokens,
        }
        found |= {f"eval/{name}/{key}": value for key, value in values.items() if value is not None}
    return found


def headline(step: int, report: Report) -> str:
    """One line for the console of a run."""
    found = [f"{name} {_percent(of_one.avg.mean)}" for name, of_one in report.scores.items()]
    average = [f"average {_percent(report.average)}"] if len(found) > 1 else []
    return f"evaluation at step {step}: {', '.join(found + average)} % in {report.seconds['total']:.0f} s"


def _cells(report: Report) -> list[list[str]]:
    """Headings and rows of the table."""
    rows = [["benchmark", "problems", "k", "avg@k", "", "pass@k", "maj@k", "cut %", "tokens"]]
    for name, of_one in report.scores.items():
        rows.append(
            [
                name,
                str(of_one.problems),
                str(of_one.samples),
                _percent(of_one.avg.mean),
                f"{_percent(of_one.avg.low)} - {_percent(of_one.avg.high)}",
                _percent(of_one.pass_at[of_one.samples].mean),
                _percent(of_one.majority.mean) if of_one.majority is not None else "-",
                _percent(of_one.truncated),
                f"{of_one.mean_response_tokens:.0f}",
            ]
        )
    if len(report.scores) > 1:
        rows.append(["average", "", "", _percent(report.average), *[""] * 5])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _score_from(fields: Mapping[str, Any]) -> Score:
    def from_json(of: Mapping[str, float] | None) -> Estimate | None:
        return None if of is None else Estimate(**of)

    return Score(
        **{
            **fields,
            "avg": Estimate(**fields["avg"]),
            "pass_at": {int(count): Estimate(**of) for count, of in fields["pass_at"].items()},
            "majority": from_json(fields["majority"]),
        }
    )


def accuracies_of(scores: Sequence[Score]) -> dict[str, float]:
    """Of all problems in several scores."""
    return {key: accuracy for of_one in scores for key, accuracy in of_one.accuracies.items()}
