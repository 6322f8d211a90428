"""Curves of TensorBoard files that the logger really wrote, drawn and looked at as pixels."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from megatron_gppo.metrics import MetricsLogger
from megatron_gppo.plot import PANELS, PlotError, draw, read_curves

ROOT = Path(__file__).parents[2]


def log_run(run_dir: Path, height: float, steps: range = range(1, 11)) -> Path:
    with MetricsLogger(run_dir, first_step=steps[0], num_steps=20, console=Console(file=io.StringIO())) as logger:
        for step in steps:
            logger.log_step(step, dict.fromkeys(PANELS, height * step))
    return run_dir


def test_read_curves(tmp_path: Path) -> None:
    run = log_run(tmp_path / "run", 1.0)
    log_run(run, 2.0, range(6, 9))  # resumed from step 5, and interrupted again
    curves = read_curves(run)
    assert set(PANELS) < set(curves)
    assert curves["policy/kl"] == {step: float(step if step < 6 else 2 * step) for step in range(1, 9)}


@pytest.mark.parametrize("seeds", [1, 3])
def test_draw(tmp_path: Path, seeds: int) -> None:
    runs = {
        label: [read_curves(log_run(tmp_path / f"{label}{seed}", slope * (1 + seed / 10))) for seed in range(seeds)]
        for label, slope in {"up": 1.0, "down": -1.0}.items()
    }
    draw(runs, tmp_path / "plot.png")
    pixels = image.imread(tmp_path / "plot.png")[:, :, :3]
    for color in ((31, 119, 180), (255, 127, 14)):  # tab10's first two
        assert (np.abs(pixels * 255 - color).max(axis=-1) < 2).sum() > 1000


def test_more_runs_than_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = read_curves(log_run(tmp_path / "run", 1.0))
    drawn = []
    monkeypatch.setattr("megatron_gppo.plot._draw_curve", lambda axis, runs, label, color: drawn.append(label))
    labels = [f"run {number}" for number in range(21)]
    draw({label: [curves] for label in labels}, tmp_path / "plot.png")
    assert drawn == labels * len(PANELS)


def test_curves_of_unequal_length_and_absent_tags(tmp_path: Path) -> None:
    long, short = read_curves(log_run(tmp_path / "a", 1.0)), read_curves(log_run(tmp_path / "b", 1.0, range(1, 4)))
    del short["policy/kl"]
    draw({"two seeds": [long, short], "nothing": [{}]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="no TensorBoard files"):
        read_curves(tmp_path)


def test_command(tmp_path: Path) -> None:
    run = log_run(tmp_path / "run", 1.0)

    def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "tools" / "plot_run.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = plot(run, "--output", tmp_path / "out.png")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'out.png'}\n")
    assert (tmp_path / "out.png").exists()
    for arguments, message in {
        (tmp_path / "absent",): "no TensorBoard files",
        (run, "--output", tmp_path / "out.pdf"): "does not end in .png",
        (run, "--output", tmp_path / "absent" / "out.png"): "there is no folder",
    }.items():
        failed = plot(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
