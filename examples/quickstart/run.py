"""The quick start: from nothing to a model that CE-GPPO has made better, on two CPU cores.

    make quickstart                                     # installs what is needed, then runs this file
    .venv/bin/python -m examples.quickstart.run         # the same, once installed; from the repository's root
        [--dir DIR] [--fresh] [section.key=value ...]   # other values for config.yaml, e.g. train.steps=4

quickstart() is the whole story: six commands, each of which can also be run by hand. An interrupted run goes on where it
stopped; --fresh deletes it and starts anew.
"""

import argparse
import shutil
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from examples.quickstart.phases import PhaseError, Phases, interrupt_on_signals, record_path
from megatron_gppo.config import Config, ConfigError, load_config
from megatron_gppo.evaluate import Report, compare_reports
from megatron_gppo.evaluate.report import read_report

CONFIG = Path("examples/quickstart/config.yaml")
FOLDER = Path("runs/quickstart")  # as the paths in CONFIG have it
NUM_RANKS = 2
EVALUATE_START, EVALUATE_RESULT = "Evaluate the start", "Evaluate the result"

console = Console(highlight=False)


def quickstart(folder: Path, overrides: list[str], *, fresh: bool = False) -> None:
    """Runs what is still to be done in the folder, or all of it anew, and prints the result.

    Raises ConfigError, PhaseError and KeyboardInterrupt.
    """
    model, checkpoint, result = folder / "model", folder / "megatron", folder / "result"
    settings = [*elsewhere(folder), *overrides]
    config = load_config(CONFIG, settings)
    if fresh:
        delete_run(folder)
    phases = Phases(folder, config.model_dump(mode="json", exclude_unset=True), console)
    python = sys.executable
    evaluate = [python, "-m", "megatron_gppo.cli", "eval", "--config", str(CONFIG), *settings]

    phases.run(
        "Build a tiny Qwen2 and warm it up",
        [python, "-m", "examples.quickstart.build_model", "--output", str(folder), "--seed", str(config.run.seed)],
    )
    phases.run(
        "Convert it to a Megatron checkpoint",
        [
            *(python, "tools/convert_hf_to_megatron.py", "--overwrite"),
            *("--hf-path", str(model), "--output", str(checkpoint)),
            *("--tp", str(config.parallel.tp), "--pp", str(config.parallel.pp)),
        ],
    )
    phases.run(EVALUATE_START, [*evaluate, f"run.dir={folder / 'start'}"])
    phases.run(
        "Train with CE-GPPO",
        [
            *(python, "-m", "megatron_gppo.cli", "train", "--nproc-per-node", str(NUM_RANKS)),
            *("--config", str(CONFIG), *settings),
        ],
    )
    phases.run(
        "Export the result to Hugging Face format",
        [
            *(python, "tools/convert_megatron_to_hf.py", "--overwrite"),
            *("--checkpoint", str(folder / "checkpoints" / f"step_{config.train.steps:08d}")),
            *("--output", str(result)),
        ],
    )
    phases.run(EVALUATE_RESULT, [*evaluate, f"model.hf_path={result}", f"run.dir={folder / 'final'}"])

    print_summary(folder, config, phases.seconds)


def elsewhere(folder: Path) -> list[str]:
    """Overrides that move all of CONFIG's paths from FOLDER to another folder."""
    if folder == FOLDER:
        return []
    return [
        f"model.hf_path={folder / 'model'}",
        f"model.checkpoint={folder / 'megatron'}",
        f"data.train={folder / 'data' / 'train.jsonl'}",
        f"data.eval={folder / 'data' / 'held_out.jsonl'}",
        f"run.dir={folder}",
    ]


def newest_report(folder: Path) -> Report:
    """Of the evaluations in a run's folder."""
    return read_report(max((folder / "eval").glob("*/report.json"), key=lambda path: path.stat().st_mtime))


def print_summary(folder: Path, config: Config, seconds: dict[str, float]) -> None:
    """Accuracy before and after, seconds by phase, and where to look next."""
    start, final = newest_report(folder / "start"), newest_report(folder / "final")
    accuracies = {EVALUATE_START: start.average, EVALUATE_RESULT: final.average}
    (comparison,) = compare_reports(start, final).values()
    gained = comparison.difference
    table = Table(box=box.SIMPLE)
    table.add_column("phase")
    table.add_column("accuracy", justify="right")
    table.add_column("seconds", justify="right")
    for phase, duration in seconds.items():
        table.add_row(phase, f"{accuracies[phase]:.1%}" if phase in accuracies else "", f"{duration:.0f}")
    table.add_section()
    table.add_row("", f"[bold]{100 * gained.mean:+.1f} points", f"{sum(seconds.values()):.0f}")
    console.print()
    console.print(table)
    console.print(
        f"accuracy: avg@{config.eval.samples} at temperature {config.eval.temperature:g} on problems that neither the "
        f"warm-up nor CE-GPPO has seen;\n          the difference is {100 * gained.low:+.1f} to {100 * gained.high:+.1f} points with 95% "
        f"confidence, paired over {gained.problems} problems",
        soft_wrap=True,
    )
    console.print(f"model:    {folder / 'result'}", soft_wrap=True)
    console.print(
        f"curves:   {Path(sys.executable).parent / 'tensorboard'} --logdir {folder / 'tensorboard'}", soft_wrap=True
    )


def delete_run(folder: Path) -> None:
    """Deletes an earlier run. Raises PhaseError if the folder is something else."""
    if not folder.exists():
        return
    if not record_path(folder).exists():
        raise PhaseError(f"{folder} is not a run of the quick start, so --fresh does not delete it. Fix: another --dir")
    shutil.rmtree(folder)


def main() -> int:
    """The command line. Returns its exit status: 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.run", description="Run the quick start.")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="folder of the run (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder and start anew")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"instead of what {CONFIG} says")
    arguments = parser.parse_intermixed_args()
    interrupt_on_signals()
    try:
        quickstart(arguments.dir, arguments.overrides, fresh=arguments.fresh)
    except (ConfigError, PhaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same call goes on from here; --fresh starts anew.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
