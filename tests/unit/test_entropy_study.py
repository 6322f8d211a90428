"""The study's variants as configurations, and its report from runs that the logger wrote. It is run by hand, not here."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from examples.entropy_study.report import COLUMNS, markdown_table, report, summary
from examples.entropy_study.run import CONFIG, FOLDER, VARIANTS, run_dir
from megatron_gppo.config import load_config
from megatron_gppo.metrics import MetricsLogger
from megatron_gppo.plot import PANELS


@pytest.mark.parametrize("label", VARIANTS)
def test_variants_are_valid_configurations(label: str) -> None:
    algorithm = load_config(CONFIG, VARIANTS[label]).algorithm
    match label.split():
        case ["CE-GPPO", beta1, beta2]:
            assert (algorithm.objective, f"β1={algorithm.beta1:g}", f"β2={algorithm.beta2:g}") == (
                "ce_gppo",
                beta1,
                beta2,
            )
        case [name]:
            assert algorithm.objective == {"GRPO": "ppo_clip", "DAPO": "dapo"}[name]
            assert algorithm.clip_high == {"GRPO": 0.2, "DAPO": 0.28}[name]


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = {run_dir(FOLDER, label, seed) for label in VARIANTS for seed in range(3)}
    assert len(folders) == 3 * len(VARIANTS)
    assert all(folder.name.isascii() and " " not in folder.name for folder in folders)


def test_summary() -> None:
    curve = {step: float(step) for step in range(20, 0, -1)}
    assert {kind: summary(curve, kind) for kind in ("first", "end", "mean", "largest")} == {
        "first": 1.0,
        "end": 19.5,
        "mean": 10.5,
        "largest": 20.0,
    }


def test_table() -> None:
    tags = {tag for tag, _ in COLUMNS.values()}
    one, other = ({tag: {1: value, 2: value + 1} for tag in tags} for value in (1.0, 3.0))
    table = markdown_table({"A": [one, other], "B": [one]})
    assert (
        table.splitlines()[2]
        == "| A | 2 ± 1.4 | 3 ± 1.4 | 2.5 ± 1.4 | 2.5 ± 1.4 | 3 ± 1.4 | 2.5 ± 1.4 | 2.5 ± 1.4 | 3 ± 1.4 |"
    )
    assert table.splitlines()[3] == "| B | 1 | 2 | 1.5 | 1.5 | 2 | 1.5 | 1.5 | 2 |"


def test_report(tmp_path: Path) -> None:
    tags = {*PANELS, *(tag for tag, _ in COLUMNS.values())}
    runs = {"A": [tmp_path / "a0", tmp_path / "a1"], "B": [tmp_path / "b0"]}
    for run in [*runs["A"], *runs["B"]]:
        with MetricsLogger(run, first_step=1, num_steps=2, console=Console(file=io.StringIO())) as logger:
            for step in (1, 2):
                logger.log_step(step, dict.fromkeys(tags, float(step)))
    assert report(runs, tmp_path) == (tmp_path / "table.md").read_text()
    assert (tmp_path / "study.png").exists()
