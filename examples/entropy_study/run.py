"""The entropy study: the paper's comparison of objectives, at a size that two CPU cores can train.

    .venv/bin/python -m examples.entropy_study.run [--quick] [--dir DIR] [--steps N] [--seeds N]

Trains the quick start's model once for every variant and seed, one after another against one SGLang server, and writes
table.md and study.png. An interrupted study goes on where it stopped.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from examples.entropy_study.report import report
from examples.quickstart.phases import PhaseError, Phases, interrupt_on_signals
from megatron_gppo.config import ConfigError, load_config
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.server import launched_engines

CONFIG = Path("examples/entropy_study/config.yaml")
FOLDER = Path("runs/entropy_study")
VARIANTS = {
    "GRPO": ["algorithm.preset=grpo"],
    "DAPO": ["algorithm.preset=dapo"],
    **{
        f"CE-GPPO β1={beta1:g} β2={beta2:g}": [f"algorithm.beta1={beta1}", f"algorithm.beta2={beta2}"]
        for beta1, beta2 in [(0.0, 1.0), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0), (1.0, 0.5)]
    },
}

console = Console(highlight=False)


def study(folder: Path, *, steps: int, seeds: int) -> None:
    """Trains what is not trained yet, and writes the report. Raises ConfigError, PhaseError, EngineError."""
    model, checkpoint = folder / "model", folder / "megatron"
    settings = [
        f"model.hf_path={model}",
        f"model.checkpoint={checkpoint}",
        f"data.train={folder / 'data' / 'train.jsonl'}",
        f"train.steps={steps}",
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
    with ExitStack() as stack:
        wait = stack.enter_context(launched_engines(config, folder / "engine.log"))
        url = wait()[0].url
        for seed in range(seeds):
            for label, objective in VARIANTS.items():
                run = [f"run.dir={run_dir(folder, label, seed)}", f"run.seed={seed}"]
                engine = ["rollout.mode=external", f"rollout.urls=[{url}]"]
                phases.run(
                    f"{label}, seed {seed}",
                    [
                        *(python, "-m", "megatron_gppo.cli", "train", "--nproc-per-node", "1", "--config", str(CONFIG)),
                        *(*settings, *objective, *engine, *run),
                    ],
                )
    runs = {label: [run_dir(folder, label, seed) for seed in range(seeds)] for label in VARIANTS}
    table = report(runs, folder)
    console.print(Markdown(table))
    console.print(f"table: {folder / 'table.md'}\nplot:  {folder / 'study.png'}", soft_wrap=True)


def run_dir(folder: Path, label: str, seed: int) -> Path:
    name = label.lower().replace(" ", "_").replace("β", "beta").replace("=", "_")
    return folder / "runs" / f"{name}_seed_{seed}"


def main() -> int:
    """The command line. Returns its exit status: 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.entropy_study.run", description="Run the entropy study.")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="folder of the study (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="8 steps and one seed, to see that everything works")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (%(default)s)")
    arguments = parser.parse_args()
    interrupt_on_signals()
    try:
        if arguments.quick:
            study(arguments.dir.with_name(f"{arguments.dir.name}_quick"), steps=8, seeds=1)
        else:
            study(arguments.dir, steps=arguments.steps, seeds=arguments.seeds)
    except (ConfigError, PhaseError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same call goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
