"""Evaluation: avg@k, the mean accuracy over k sampled responses to every problem of data.eval."""

import asyncio
import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.data import load_prompts, load_tokenizer
from megatron_gppo.datatypes import Group, Prompt
from megatron_gppo.rollout import generate
from megatron_gppo.rollout.engine import Engine
from megatron_gppo.rollout.rewards import RewardPool
from megatron_gppo.rollout.server import launched_engines


@dataclass(frozen=True, slots=True)
class Score:
    """Over all samples of some problems."""

    problems: int
    accuracy: float  # avg@k: share of correct samples
    truncated: float  # share of samples that reached eval.max_response_tokens
    mean_response_tokens: float


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What an evaluation found, and how it sampled."""

    samples: int  # k
    temperature: float
    top_p: float
    max_response_tokens: int
    overall: Score  # every problem counts the same
    by_source: dict[str, Score]  # by Prompt.data_source
    counts: dict[str, int]  # events by name, as in datatypes.Rollout
    seconds: dict[str, float]


def evaluate(
    config: Config,
    engines: Sequence[Engine],
    prompts: Sequence[Prompt],
    judge: generate.Judge,
    *,
    on_progress: generate.Progress = lambda done, wanted: None,
) -> EvalReport:
    """Samples config.eval.samples responses to every prompt, with whatever weights the engines hold.

    Raises EngineError.
    """
    return asyncio.run(_evaluate(config, engines, prompts, judge, on_progress))


def run_evaluation(config: Config) -> EvalReport:
    """Evaluates model.hf_path (managed), or what the servers at rollout.urls hold, on data.eval.

    Prints a table and writes the report to run.dir/eval. Raises ConfigError, DataError, RewardError, EngineError.
    """
    console = Console()
    folder = config.run.dir / "eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir = {config.run.dir}: {error.strerror}. Fix: give a folder that can be written"
        ) from error
    prompt_set = load_prompts(config.data, load_tokenizer(config.model.hf_path), "eval")
    started = datetime.now(UTC)
    pool = RewardPool(config.reward)
    try:
        with launched_engines(config, config.run.dir / "engine.log") as wait_for_engines:
            with console.status("waiting for the engine"):
                engines = wait_for_engines()
            with Progress(
                TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                console=console,
            ) as bar:  # fmt: skip
                task = bar.add_task("", total=len(prompt_set.prompts))
                report = evaluate(
                    config,
                    engines,
                    prompt_set.prompts,
                    pool,
                    on_progress=lambda done, _: bar.update(task, completed=done),
                )
    finally:
        pool.close()
    path = folder / f"{started:%Y%m%d-%H%M%S}.json"
    write_report(path, config, report, prompt_set.num_too_long)
    console.print(table(report))
    if prompt_set.num_too_long:
        console.print(f"{prompt_set.num_too_long} problems longer than data.max_prompt_tokens were left out")
    console.print(f"report: {path}")
    return report


def write_report(path: Path, config: Config, report: EvalReport, num_too_long: int) -> None:
    """The report as JSON, with what it was made from."""
    of = {
        "model": str(config.model.hf_path),
        "urls": config.rollout.urls,
        "data": config.model_dump(mode="json")["data"]["eval"],
        "left_out_too_long": num_too_long,
    }
    path.write_text(json.dumps({**of, **dataclasses.asdict(report)}, indent=2) + "\n")


def table(report: EvalReport) -> Table:
    """For the console: a line a data source, and one for all problems if there are several."""
    result = Table(title=f"avg@{report.samples}, temperature {report.temperature:g}, top-p {report.top_p:g}")
    result.add_column("data source")
    for heading in ("problems", "accuracy %", "truncated %", "tokens"):
        result.add_column(heading, justify="right")
    scores = dict(report.by_source)
    if len(scores) > 1:
        scores["all"] = report.overall
    for name, score in scores.items():
        result.add_row(
            name,
            str(score.problems),
            f"{100 * score.accuracy:.1f}",
            f"{100 * score.truncated:.1f}",
            f"{score.mean_response_tokens:.0f}",
        )
    return result


async def _evaluate(
    config: Config,
    engines: Sequence[Engine],
    prompts: Sequence[Prompt],
    judge: generate.Judge,
    on_progress: generate.Progress,
) -> EvalReport:
    sampling = config.eval
    generator = generate.GroupGenerator(
        engines, judge, sampling, sampling.samples, concurrency=config.rollout.concurrency
    )
    done = 0

    async def answer(prompt: Prompt) -> Group:
        nonlocal done
        group = await generator.group(prompt)
        done += 1
        on_progress(done, len(prompts))
        return group

    groups: list[Group] = await generator.all([answer(prompt) for prompt in prompts])
    by_source: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_source[group.prompt.data_source].append(group)
    return EvalReport(
        samples=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_response_tokens=sampling.max_response_tokens,
        overall=_score(groups),
        by_source={name: _score(by_source[name]) for name in sorted(by_source)},
        counts=dict(generator.counts),
        seconds=generator.seconds,
    )


def _score(groups: Sequence[Group]) -> Score:
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    responses = [response for group in groups for response in group.responses]
    return Score(
        problems=len(groups),
        accuracy=sum(verdict.correct for verdict in verdicts) / len(verdicts),
        truncated=sum(response.truncated for response in responses) / len(responses),
        mean_response_tokens=sum(len(response.token_ids) for response in responses) / len(responses),
    )
