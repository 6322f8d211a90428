"""Draws a run's curves from its TensorBoard files; runs of the same label, such as seeds, as one mean and its spread."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no display is needed to write a file

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "policy/entropy": "entropy (nats)",
    "reward/accuracy": "accuracy",
    "policy/kl": "KL to the policy before the step",
    "policy/grad_norm": "gradient norm",
    "quadrant/pa_hp_tokens": "PA & HP, share of tokens",
    "quadrant/pa_lp_tokens": "PA & LP",
    "quadrant/na_hp_tokens": "NA & HP",
    "quadrant/na_lp_tokens": "NA & LP",
}
COLUMNS = 4

Curves = dict[str, dict[int, float]]  # tag: step: value


class PlotError(ValueError):
    """A run that cannot be drawn. One line: which, why, and the fix."""


def read_curves(run_dir: Path) -> Curves:
    """All scalars of a run. Where a resumed run has logged a step again, the later value counts.

    Raises PlotError for a folder without them.
    """
    folder = run_dir / "tensorboard"
    if not any(folder.glob("events.out.tfevents.*")):
        raise PlotError(f"{run_dir}: no TensorBoard files in {folder}. Fix: name the run.dir of a training run")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    if not curves:
        raise PlotError(f"{run_dir}: not a single step is logged yet. Fix: wait for the run's first step")
    return curves


def draw(runs: Mapping[str, Sequence[Curves]], path: Path) -> None:
    """Writes a PNG: one line a label, the mean of its runs; where these are several, a band from minimum to maximum."""
    rows = -(-len(PANELS) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 3.2 * rows), layout="constrained")
    colors = pyplot.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    for axis, (tag, title) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        for (label, curves), color in zip(runs.items(), itertools.cycle(colors), strict=False):
            _draw_curve(axis, [run[tag] for run in curves if tag in run], label, color)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_curve(axis: Axes, curves: Sequence[dict[int, float]], label: str, color: tuple[float, float, float]) -> None:
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return
    values = np.array([[curve[step] for step in steps] for curve in curves])
    axis.plot(steps, values.mean(axis=0), color=color, label=label, linewidth=1.5)
    if len(curves) > 1:
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
