"""megatron-gppo eval: a model, a Megatron checkpoint, or what running engines hold, on all benchmarks."""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.convert import Architecture, convert_megatron_to_hf
from megatron_gppo.data import load_tokenizer
from megatron_gppo.evaluate.benchmarks import load_benchmarks
from megatron_gppo.evaluate.compare import compare_reports, comparison_table
from megatron_gppo.evaluate.evaluator import Evaluator
from megatron_gppo.evaluate.report import MARKDOWN, REPORT, Report, console_table, read_report
from megatron_gppo.rollout.engine import Engine
from megatron_gppo.rollout.launch import launched_engines
from megatron_gppo.rollout.rewards import Rewards

HASH_CHARACTERS = 8


def run_evaluation(config: Config, checkpoint: Path | None = None) -> Report:
    """Evaluates model.hf_path, or the Megatron checkpoint, or what the servers at rollout.urls hold.

    Records and report go to run.dir/eval/MODEL-HASH, where the hash is of everything that they depend on: the same call
    goes on where an interrupted one stopped, and another model or setting never meets its records. Raises the errors of
    megatron_gppo.errors.
    """
    if config.rollout.mode == "external" and checkpoint is not None:
        raise ConfigError(
            f"--checkpoint {checkpoint} with rollout.mode = external: the engines hold their own weights. Fix: use one of them"
        )
    console = Console()
    with ExitStack() as stack:
        prepare_folder(config.run.dir)
        architecture = Architecture.from_hf(config.model.hf_path)
        benchmarks = load_benchmarks(config, load_tokenizer(config.model.hf_path), architecture.max_position_embeddings)
        source = checkpoint or config.model.hf_path
        if checkpoint is not None:
            config = stack.enter_context(_exported(config, checkpoint, console))
        rewards = Rewards(config.reward)
        stack.callback(rewards.close)
        if config.rollout.mode == "managed":  # external ones beside them hold weights of their own
            config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"urls": []})})
        engines = stack.enter_context(launched_engines(config, needs_weights=False))
        with console.status("waiting for the engines"):
            engines.wait_ready()
        name, identity = source.resolve().name, _identity_of_files(source)
        if config.rollout.mode == "external":
            name, identity = asyncio.run(_identity_of_engines(engines.serving()))
        evaluator = Evaluator(config.rollout, config.reward, engines, rewards, benchmarks)
        key = json.dumps(evaluator.settings(identity), sort_keys=True)
        folder = config.run.dir / "eval" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:HASH_CHARACTERS]}"
        if evaluator.has_done(folder, identity):
            report = read_report(folder)
            console.print(f"nothing to do: evaluated before; delete {folder} to evaluate anew", soft_wrap=True)
        else:
            bar = stack.enter_context(_progress_bar(console))
            task = bar.add_task("")
            report = evaluator.run(
                folder,
                name,
                identity,
                on_progress=lambda done, wanted: bar.update(task, completed=done, total=wanted),
            )
    console.print(console_table(report))
    for benchmark in benchmarks:
        if left_out := {reason: count for reason, count in benchmark.left_out.items() if count}:
            console.print(f"{benchmark.name}: left out {', '.join(f'{v} {k}' for k, v in sorted(left_out.items()))}")
    console.print(f"responses and report: {folder} ({REPORT}, {MARKDOWN})", soft_wrap=True)
    return report


def run_comparison(first: Path, second: Path) -> None:
    """Prints whether the second model differs from the first. Raises EvaluationError."""
    reports = read_report(first), read_report(second)
    comparisons = compare_reports(*reports)
    console = Console()
    console.print(comparison_table(*reports, comparisons))
    for name, of_one in comparisons.items():
        if of_one.unpaired:
            console.print(f"{name}: {of_one.unpaired} problems are in one of the reports only, and are left out")
        if of_one.caution:
            console.print(f"{name}: the reports were sampled unlike: {of_one.caution}")


def prepare_folder(folder: Path) -> None:
    """Before anything is started. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir = {folder}: {error.strerror}. Fix: give a folder that can be written") from error


@contextmanager
def _exported(config: Config, checkpoint: Path, console: Console) -> Iterator[Config]:
    """The configuration with the checkpoint, in Hugging Face format, as its model. What it wrote is deleted again."""
    with tempfile.TemporaryDirectory(prefix="exported-", dir=config.run.dir) as folder:
        with console.status(f"converting {checkpoint}"):
            convert_megatron_to_hf(checkpoint, Path(folder) / "model")
        model = config.model.model_copy(update={"hf_path": Path(folder) / "model"})
        yield config.model_copy(update={"model": model})


def _identity_of_files(model: Path) -> dict[str, Any]:
    """Files, sizes and times tell a model that was replaced under its name, without reading gigabytes."""
    files = {
        str(path.relative_to(model)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(model.rglob("*"))
        if path.suffix in (".safetensors", ".distcp")
    }
    return {"path": str(model.resolve()), "files": files}


async def _identity_of_engines(engines: Sequence[Engine]) -> tuple[str, dict[str, Any]]:
    """By what the engines say they hold: their model's folder and the version of their weights."""
    held = []
    for engine in engines:
        await engine.connect()
        try:
            info = await engine.model_info()
        finally:
            await engine.disconnect()
        held.append([info.get("model_path"), info.get("weight_version")])
    path, version = held[0]
    name = Path(str(path)).name + (f"-version-{version}" if str(version).isdigit() else "")
    return name, {"engines": sorted(map(str, held))}


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )  # fmt: skip
