"""Evaluation within a real run, which is interrupted and goes on with another number of data-parallel ranks."""

import json
from pathlib import Path

import pytest

from megatron_gppo.config import load_config
from megatron_gppo.convert import convert_hf_to_megatron
from megatron_gppo.data import PromptStream, load_prompts, load_tokenizer
from megatron_gppo.evaluate import compare_reports
from megatron_gppo.evaluate.command import run_evaluation
from megatron_gppo.evaluate.report import read_report
from megatron_gppo.rollout.record import read_rollout
from tests.support.rollout import make_config
from tests.support.training import scalars, train, write_config


def write_problems(folder: Path) -> dict[str, str]:
    path = folder / "eval.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}+1=", "answer": n + 1}) + "\n" for n in range(5)))
    return {"path": str(path)}


def test_a_run_evaluates_before_and_after_every_step_and_its_prompts_stay_in_order(
    engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    recorded = tmp_path / "recorded"
    file = write_config(
        tmp_path,
        tiny_model,
        rollout={"mode": "external", "urls": [engine_url], "record": str(recorded)},
        eval={"every": 1, "samples": 2, "max_response_tokens": 8, "benchmarks": {"sums": write_problems(tmp_path)}},
        reward={"format_weight": 0.5, "overlong": {"buffer_tokens": 20, "penalty": 0.25}},
    )
    first = train(file, 1, "train.steps=1")
    assert "evaluation at step 0: sums" in first
    assert "evaluation at step 1: sums" in first
    before = (tmp_path / "run" / "eval" / "step_00000001" / "sums.jsonl").read_bytes()
    second = train(file, 2, "train.steps=2")  # dp 1 -> dp 2
    assert "resumed from" in second
    assert "evaluation at step 2: sums" in second
    assert "evaluation at step 1" not in second, "what is complete is not repeated"
    assert (tmp_path / "run" / "eval" / "step_00000001" / "sums.jsonl").read_bytes() == before

    config = load_config(file)
    prompts = load_prompts(config.data, load_tokenizer(tiny_model), "train").prompts
    stream = PromptStream(prompts, shuffle=True, seed=config.run.seed)
    rollouts = [read_rollout(recorded, step) for step in (1, 2)]
    for rollout in rollouts:
        assert [group.prompt for group in rollout.groups] == stream.take(8)
        assert {name for group in rollout.groups for one in group.verdicts for name in one.parts} == {
            "answer",
            "format",
            "overlong",
        }
    reports = [read_report(tmp_path / "run" / "eval" / f"step_0000000{step}") for step in range(3)]
    assert [report.scores["sums"].problems for report in reports] == [5, 5, 5]
    assert "sums" in compare_reports(reports[0], reports[2])
    logged = scalars(tmp_path / "run")
    assert logged["eval/sums/accuracy"] == pytest.approx([report.scores["sums"].avg.mean for report in reports])
    assert len(logged["reward_part/overlong"]) == 2
    assert min(logged["reward_part/overlong"]) < 0


def test_a_megatron_checkpoint_on_an_engine_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """Through the managed engine, which starts from the exported checkpoint."""
    convert_hf_to_megatron(tiny_model, tmp_path / "step_00000007")
    config = make_config(tiny_model, tmp_path / "run").model_dump(mode="json")
    config["eval"] |= {"samples": 2, "max_response_tokens": 8, "benchmarks": {"sums": write_problems(tmp_path)}}
    report = run_evaluation(type(make_config(tiny_model, tmp_path)).model_validate(config), tmp_path / "step_00000007")
    assert report.model == "step_00000007"
    assert report.scores["sums"].problems == 5
    assert not list((tmp_path / "run").glob("exported-*"))
