"""What a run trains on: nothing that it is evaluated on, no answer that cannot be read, and the same after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gppo.config import Config, parse_config
from megatron_gppo.data import DataError
from megatron_gppo.evaluate import load_benchmarks
from megatron_gppo.rollout.rewards import Rewards
from megatron_gppo.training_prompts import (
    check_unchanged,
    load_training_prompts,
    without_unreadable_answers,
    write_decontamination_report,
)
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_tokenizer

LEAKED = "find the sum of all primes p such that p plus one is a square"


def make(tmp_path: Path, rows: list[Any], **data: Any) -> Config:
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": f"{LEAKED}.", "answer": 3}) + "\n")
    tree = make_config(tmp_path, tmp_path / "run").model_dump(mode="json")
    tree["data"] |= {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), **data}
    tree["data"] |= {"max_prompt_tokens": 200}
    return parse_config(tree)


def rows(*questions: str) -> list[Any]:
    return [{"question": question, "answer": 1} for question in questions]


def test_decontamination(tmp_path: Path) -> None:
    config = make(tmp_path, rows("1+1=", f"Please {LEAKED.upper()} number", "2+2="), decontamination_ngram=9)
    tokenizer = make_tiny_tokenizer()
    benchmarks = load_benchmarks(config, tokenizer, 100_000)
    prompts, report = load_training_prompts(config, tokenizer, benchmarks)
    assert [prompt.row for prompt in prompts.prompts] == [0, 2]
    assert prompts.summary() == "left out 1 of 3 rows: 1 contaminated"
    write_decontamination_report(tmp_path, report)
    (line,) = (tmp_path / "decontamination.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "place": f"{tmp_path / 'train.jsonl'}, line 2",
        "question": f"Please {LEAKED.upper()} number",
        "benchmark": "eval",
        "problem": f"{LEAKED}.",
        "shared": "find the sum of all primes p such that",
    }
    kept, report = load_training_prompts(make(tmp_path, rows(LEAKED)), tokenizer, benchmarks)
    assert (len(kept.prompts), report) == (1, [])
    with pytest.raises(DataError, match="all 1 prompts share 9 words in a row"):
        load_training_prompts(make(tmp_path, rows(LEAKED), decontamination_ngram=9), tokenizer, benchmarks)


def test_answers_that_cannot_be_read_are_bad_rows(tmp_path: Path) -> None:
    bad = [{"question": "1=", "answer": "1"}, {"question": "2=", "answer": "\\sqrt{2}+"}]
    config = make(tmp_path, bad)
    rewards = Rewards(config.reward)
    try:
        prompts, _ = load_training_prompts(config, make_tiny_tokenizer(), [])
        with pytest.raises(
            DataError, match=r"train.jsonl, line 2: the ground truth '\\\\sqrt\{2\}\+' cannot be read"
        ) as error:
            without_unreadable_answers(prompts, rewards, config)
        assert "Fix: correct the row, or set data.on_bad_row: skip" in str(error.value)
        left = without_unreadable_answers(prompts, rewards, make(tmp_path, bad, on_bad_row="skip"))
        assert [prompt.row for prompt in left.prompts] == [0]
        assert left.dropped == {"bad row": 1}
    finally:
        rewards.close()


@pytest.mark.parametrize("change", ["rows", "answer", "suffix", "seed", "shuffle", "weights", "limit"])
def test_a_run_goes_on_with_its_own_prompts_only(tmp_path: Path, change: str) -> None:
    tokenizer = make_tiny_tokenizer()

    def check(config: Config, *, resuming: bool) -> None:
        check_unchanged(load_training_prompts(config, tokenizer, [])[0], config, resuming=resuming)

    config = make(tmp_path, rows("1=", "2+1="))
    check(config, resuming=False)
    check(config, resuming=True)
    changed = {
        "rows": lambda: make(tmp_path, rows("1=", "2+1=", "3=")),
        "answer": lambda: make(tmp_path, [*rows("1="), {"question": "2+1=", "answer": 3}]),
        "suffix": lambda: make(tmp_path, rows("1=", "2+1="), prompt_suffix="?"),
        "shuffle": lambda: make(tmp_path, rows("1=", "2+1="), shuffle=False),
        "weights": lambda: make(
            tmp_path, rows("1=", "2+1="), train={"path": str(tmp_path / "train.jsonl"), "weight": 1}
        ),
        "seed": lambda: config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})}),
        "limit": lambda: config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": 4})}),
    }[change]()
    with pytest.raises(DataError, match=r"cannot go on at its position\. Fix: restore data"):
        check(changed, resuming=True)
    check(changed, resuming=False)  # from the start it may
    check(changed, resuming=True)
