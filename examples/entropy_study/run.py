"""The entropy study: the paper's comparison of objectives, at a size that two CPU cores can train.

    .venv/bin/python -m examples.entropy_study.run [--quick] [--dir DIR] [--steps N] [--seeds N] [--lanes N]

Trains the quick start's model once for every variant and seed, a run after another in each of several lanes, which have an
SGLang server each, and writes table.md and study.png. An interrupted study goes on where it stopped.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from examples.entropy_study.report import report
from examples.quickstart.phases import ENVIRONMENT, STOP_TIMEOUT_S, PhaseError, Phases, interrupt_on_signals
from megatron_gppo.config import ConfigError, load_config
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.server import ManagedServer

CONFIG = Path("examples/entropy_study/config.yaml")
FOLDER = Path("runs/entropy_study")
QUICK = ["rollout.prompts_per_step=32"]
VARIANTS = {
    "GRPO": ["algorithm.preset=grpo"],
    "DAPO": ["algorithm.preset=dapo"],
    **{
        f"CE-GPPO β1={beta1:g} β2={beta2:g}": [f"algorithm.beta1={beta1}", f"algorithm.beta2={beta2}"]
        for beta1, beta2 in [(0.0, 1.0), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0), (1.0, 0.5)]
    },
}

console = Console(highlight=False)


@dataclass(frozen=True)
class StudyRun:
    """One training run: what it is called, where it writes, and the command that trains it, but for the engine."""

    title: str
    folder: Path
    steps: int
    command: list[str]

    @property
    def done(self) -> bool:
        return (self.folder / "checkpoints" / f"step_{self.steps:08d}").exists()


def study(folder: Path, *, steps: int, seeds: int, lanes: int, overrides: Sequence[str] = ()) -> None:
    """Trains what is not trained yet, and writes the report. Raises ConfigError, PhaseError, EngineError."""
    model, checkpoint = folder / "model", folder / "megatron"
    settings = [
        f"model.hf_path={model}",
        f"model.checkpoint={checkpoint}",
        f"data.train={folder / 'data' / 'train.jsonl'}",
        f"train.steps={steps}",
        *overrides,
    ]
    config = load_config(CONFIG, [*settings, f"run.dir={folder}"])
    phases = Phases(folder, {"steps": steps}, console)
    python = sys.executable
    phases.run("Build the model", [python, "-m", "examples.quickstart.build_model", "--output", str(folder)])
    phases.run(
        "Convert it",
        [
            *(python, "tools/convert_hf_to_megatron.py", "--overwrite"),
            *("--hf-path", str(model), "--output", str(checkpoint)),
        ],
    )
    train = [python, "-m", "megatron_gppo.cli", "train", "--nproc-per-node", "1", "--config", str(CONFIG), *settings]
    runs = [
        StudyRun(
            f"{label}, seed {seed}",
            run_dir(folder, label, seed),
            steps,
            [*train, *objective, f"run.dir={run_dir(folder, label, seed)}", f"run.seed={seed}"],
        )
        for seed in range(seeds)
        for label, objective in VARIANTS.items()
    ]
    if waiting := [run for run in runs if not run.done]:
        console.rule(f"[bold]Train {len(waiting)} of {len(runs)} runs, {lanes} at a time", align="left")
        with ExitStack() as stack:
            engines = [
                stack.enter_context(ManagedServer(config, folder / f"engine_{lane}.log")) for lane in range(lanes)
            ]
            for engine in engines:
                engine.wait_ready()
            asyncio.run(train_all(waiting, [engine.url for engine in engines]))
    folders = {label: [run_dir(folder, label, seed) for seed in range(seeds)] for label in VARIANTS}
    table = report(folders, folder)
    console.print(Markdown(table))
    console.print(f"table: {folder / 'table.md'}\nplot:  {folder / 'study.png'}", soft_wrap=True)


def run_dir(folder: Path, label: str, seed: int) -> Path:
    name = label.lower().replace(" ", "_").replace("β", "beta").replace("=", "_")
    return folder / "runs" / f"{name}_seed_{seed}"


async def train_all(runs: Sequence[StudyRun], urls: Sequence[str]) -> None:
    """Trains the runs in order, each with whichever engine is free. Raises PhaseError at the first that fails; the others end."""
    waiting = list(runs)

    async def lane(url: str) -> None:
        while waiting:
            await train_one(waiting.pop(0), url)

    try:
        async with asyncio.TaskGroup() as lanes:
            for url in urls:
                lanes.create_task(lane(url))
    except* PhaseError as failures:
        raise failures.exceptions[0] from None


async def train_one(run: StudyRun, url: str) -> None:
    """What the run prints goes into its folder. Cancelled, it lets the trainer save its progress first."""
    run.folder.mkdir(parents=True, exist_ok=True)
    output = run.folder / "output.log"
    started = time.monotonic()
    with output.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *run.command,
            "rollout.mode=external",
            f"rollout.urls=[{url}]",
            env={**os.environ, **ENVIRONMENT},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            exit_code = await process.wait()
        except asyncio.CancelledError:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if exit_code:
        raise PhaseError(f"{run.title}: exit code {exit_code}, see {output}. The same call goes on from here.")
    console.print(f"{run.title}: {time.monotonic() - started:.0f} s")


def main() -> int:
    """The command line. Returns its exit status: 0 done, 1 failed, 130 interrupted."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m examples.entropy_study.run", description="Run the entropy study.")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="folder of the study (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 short steps and one seed, to see that everything works")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (%(default)s)")
    parser.add_argument(
        "--lanes", type=int, default=cores, help="runs at a time: trainer and engine take turns on a core (%(default)s)"
    )
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.seeds, arguments.lanes) < 1:
        parser.error("--steps, --seeds and --lanes are at least 1")
    interrupt_on_signals()
    folder, steps, seeds = arguments.dir, arguments.steps, arguments.seeds
    if arguments.quick:
        folder, steps, seeds = folder.with_name(f"{folder.name}_quick"), 3, 1
    try:
        study(folder, steps=steps, seeds=seeds, lanes=arguments.lanes, overrides=QUICK if arguments.quick else [])
    except (ConfigError, PhaseError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same call goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
