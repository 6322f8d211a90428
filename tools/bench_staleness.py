"""Trains the quick start's model with async.staleness 0, 1 and 2, from the same start, and compares speed and accuracy.

    python -m tools.bench_staleness [--dir runs/staleness] [--steps 30] [--trainer-core 0] [--engine-core 1] [section.key=value ...]

One trainer rank and one engine, each on one core in every run, so that neither gains by the other's pauses. Seconds a step are
means over all steps but the first two, in which a run that generates ahead has nothing ahead yet; the accuracy is avg@4 on
held-out problems after the last step. From the repository's root, on Linux.

bound: what a step takes when generation and training hide each other, max(rollout, score + train) of staleness 0 and the
row's own sync.
engine busy: share of the time in which the engine has a request and is not paused for a sync. A sync that meets no request is
taken for one that does, so with staleness the engine is busy for at least this share.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.quickstart.phases import ENVIRONMENT
from examples.quickstart.run import CONFIG, elsewhere
from megatron_gppo.plot import Curves, read_curves

SKIPPED_STEPS = 2
COLUMNS = {  # heading: tag; means over the steps
    "s/step": "seconds/step",
    "waits for rollout": "seconds/rollout",
    "score": "seconds/score",
    "train": "seconds/train",
    "sync": "seconds/sync",
}


def build(folder: Path) -> None:
    """The start of all runs, unless it is there."""
    model, checkpoint = folder / "model", folder / "megatron"
    if checkpoint.exists():
        return
    python = sys.executable
    call([python, "-m", "examples.quickstart.build_model", "--output", str(folder)])
    call(
        [
            *(python, "tools/convert_hf_to_megatron.py", "--overwrite"),
            *("--hf-path", str(model), "--output", str(checkpoint)),
        ]
    )


def train(folder: Path, staleness: int, options: argparse.Namespace) -> Curves:
    """A run of its own with this staleness, and what it logged."""
    run = folder / f"staleness_{staleness}"
    shutil.rmtree(run, ignore_errors=True)
    settings = [
        *elsewhere(folder),
        "parallel.tp=1",
        f"train.steps={options.steps}",
        f"async.staleness={staleness}",
        "sync.pause=retract",
        "rollout.engines=[{cores: [%d]}]" % options.engine_core,  # noqa: UP031 - braces
        f"eval.every={options.steps}",
        "eval.before_training=false",
        "eval.samples=4",
        "run.save_every=1000",
        f"run.dir={run}",
        *options.overrides,
    ]
    command = [sys.executable, "-m", "megatron_gppo.cli", "train", "--nproc-per-node", "1", "--config", str(CONFIG)]
    call(["taskset", "--cpu-list", str(options.trainer_core), *command, *settings])
    return read_curves(run)


def call(command: list[str]) -> None:
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})


def table(runs: Mapping[int, Curves]) -> list[str]:
    """Its lines, by staleness."""
    headings = ["staleness", *COLUMNS, "bound", "engine busy", "mean age", "accuracy"]
    return [
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(row(staleness, curves, runs.get(0)) for staleness, curves in runs.items()),
    ]


def row(staleness: int, curves: Curves, alternating: Curves | None) -> str:
    cells = [f"{mean(curves, tag):.2f}" for tag in COLUMNS.values()]
    sync, busy, bound = mean(curves, "seconds/sync"), mean(curves, "seconds/generate"), "-"
    if staleness > 0:
        busy -= sync
        if alternating is not None:
            training = mean(alternating, "seconds/score") + mean(alternating, "seconds/train")
            bound = f"{max(mean(alternating, 'seconds/rollout'), training) + sync:.2f}"
    accuracy = curves["eval/average"][max(curves["eval/average"])]
    age = f"{mean(curves, 'rollout/staleness_mean'):.2f}"
    share = f"{busy / mean(curves, 'seconds/step'):.0%}"
    return f"| {staleness} | {' | '.join(cells)} | {bound} | {share} | {age} | {accuracy:.1%} |"


def mean(curves: Curves, tag: str) -> float:
    return float(np.mean([value for step, value in curves[tag].items() if step > SKIPPED_STEPS]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare async.staleness 0, 1 and 2 on the quick start's model.")
    parser.add_argument("--dir", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--engine-core", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    build(options.dir)
    runs = {staleness: train(options.dir, staleness, options) for staleness in options.staleness}
    print("", *table(runs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
