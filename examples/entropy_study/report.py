"""The study's table and plot, from the TensorBoard files of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_gppo.plot import Curves, draw, read_curves

LAST_SHARE = 0.1  # of a run's steps: what its end is the mean of
COLUMNS = {
    "entropy, first step": ("policy/entropy", "first"),
    "entropy, end": ("policy/entropy", "end"),
    "left of the clip range, A < 0": ("ratio/left_of_clip_acting", "mean"),
    "right of it, A > 0": ("ratio/right_of_clip_acting", "mean"),
    "accuracy, end": ("reward/accuracy", "end"),
    "KL, mean": ("policy/kl", "mean"),
    "gradient norm, mean": ("policy/grad_norm", "mean"),
    "gradient norm, largest": ("policy/grad_norm", "largest"),
}


def report(runs: Mapping[str, Sequence[Path]], folder: Path) -> str:
    """Writes table.md and study.png into the folder, from the runs of each variant. Returns the table."""
    curves = {label: [read_curves(run) for run in seeds] for label, seeds in runs.items()}
    table = markdown_table(curves)
    (folder / "table.md").write_text(table)
    draw(curves, folder / "study.png")
    return table


def markdown_table(curves: Mapping[str, Sequence[Curves]]) -> str:
    """A row a variant: mean over its seeds ± their standard deviation (ddof 1), where there are several."""
    lines = [f"| variant | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for label, seeds in curves.items():
        cells = [_cell([summary(run[tag], kind) for run in seeds]) for tag, kind in COLUMNS.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(curve: Mapping[int, float], kind: str) -> float:
    """One number of a curve by step: its "first" value, the mean of its last tenth ("end"), its "mean" or "largest"."""
    values = [curve[step] for step in sorted(curve)]
    match kind:
        case "first":
            return values[0]
        case "end":
            return float(np.mean(values[-max(1, round(LAST_SHARE * len(values))) :]))
        case "largest":
            return max(values)
        case _:
            return float(np.mean(values))


def _cell(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"
