"""The arithmetic of an evaluation."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_gppo.config import ConfigError, EvalConfig
from megatron_gppo.datatypes import Prompt
from megatron_gppo.evaluate import Score, evaluate, run_evaluation, table, write_report
from tests.support.fake_engine import FakeEngine, FakeJudge
from tests.support.rollout import make_config


def test_avg_at_k(tmp_path: Path) -> None:
    config = make_config(Path("model"), tmp_path).model_copy(update={"eval": EvalConfig(samples=4)})
    prompts = [Prompt(row, [row], "", "", "hard" if row < 3 else "easy") for row in range(4)]
    progress: list[tuple[int, int]] = []
    report = evaluate(config, [FakeEngine()], prompts, FakeJudge({0}), on_progress=lambda *at: progress.append(at))
    # One of four samples is correct, in three of four problems.
    assert report.overall == Score(problems=4, accuracy=3 / 16, truncated=0.0, mean_response_tokens=3.0)
    assert list(report.by_source) == ["easy", "hard"]
    assert report.by_source["easy"].accuracy == 1 / 4
    assert report.by_source["hard"].accuracy == pytest.approx(1 / 6)
    assert (report.samples, report.temperature, report.top_p) == (4, 0.6, 0.95)
    assert progress == [(done, 4) for done in range(1, 5)]

    console = Console(record=True, width=100)
    console.print(table(report))
    text = console.export_text()
    assert [line.split()[1:-1:2] for line in text.splitlines() if "all" in line] == [["all", "4", "18.8", "0.0", "3"]]

    write_report(tmp_path / "report.json", config, report, num_too_long=2)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["model"] == "model"
    assert written["left_out_too_long"] == 2
    assert written["by_source"]["hard"]["problems"] == 3


def test_a_run_folder_that_cannot_be_written_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir = .*/file: .*Fix: give a folder that can be written"):
        run_evaluation(make_config(tmp_path, tmp_path / "file"))
