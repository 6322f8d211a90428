"""The prompts that a run trains on: loaded, decontaminated, their answers readable, and the same after a resume."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_gppo.config import Config
from megatron_gppo.data import Contamination, DataError, PromptSet, find_contamination, load_prompts
from megatron_gppo.evaluate import Benchmark
from megatron_gppo.rollout.rewards import Rewards

CONTAMINATED = "contaminated"
DECONTAMINATION_REPORT = "decontamination.jsonl"
FINGERPRINT = "prompts.json"


def load_training_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark]
) -> tuple[PromptSet, list[str]]:
    """data.train without what it shares with the benchmarks, and a line of JSON for each prompt that this cost.

    Raises DataError.
    """
    loaded = load_prompts(config.data, tokenizer, "train")
    if config.data.decontamination_ngram is None:
        return loaded, []
    questions = [origin.question for origin in loaded.origins]
    of_benchmarks = {benchmark.name: benchmark.questions for benchmark in benchmarks}
    found = find_contamination(questions, of_benchmarks, config.data.decontamination_ngram)
    left = loaded.without({one.prompt for one in found}, CONTAMINATED)
    if not left.prompts:
        raise DataError(
            f"data.train: all {len(loaded.prompts)} prompts share {config.data.decontamination_ngram} words in a row with an "
            "evaluation problem. Fix: train on other data, or raise data.decontamination_ngram"
        )
    return left, [_report_line(one, loaded, of_benchmarks[one.benchmark][one.problem]) for one in found]


def without_unreadable_answers(prompts: PromptSet, rewards: Rewards, config: Config) -> PromptSet:
    """Every prompt whose ground truth math_verify cannot read is a bad row. Raises BadRowError unless those are skipped."""
    bad = {
        index: f"the ground truth {prompts.prompts[index].ground_truth!r} cannot be read by math_verify. Fix: correct the "
        "row, or set data.on_bad_row: skip"
        for index in rewards.unparsable_ground_truths(prompts.prompts)
    }
    return prompts.without_bad(bad, config.data)


def check_unchanged(prompts: PromptSet, config: Config, *, resuming: bool) -> None:
    """Remembers the prompts and their order in run.dir; a run that goes on must have the same.

    A position in the data means nothing otherwise. Raises DataError.
    """
    path = config.run.dir / FINGERPRINT
    digest = hashlib.sha256(repr((config.data.shuffle, config.run.seed, prompts.shares(config.data))).encode())
    for prompt in prompts.prompts:
        digest.update(repr((prompt.row, prompt.token_ids, prompt.ground_truth)).encode())
    now = {"prompts": len(prompts.prompts), "sha256": digest.hexdigest()}
    if resuming and path.exists() and (before := json.loads(path.read_text())) != now:
        raise DataError(
            f"data.train: {now['prompts']} prompts where the run in {config.run.dir} has had {before['prompts']}, or others, or in "
            "another order, so it cannot go on at its position. Fix: restore data.*, run.seed, the files and the tokenizer, "
            "or start a new run.dir with model.checkpoint"
        )
    path.write_text(json.dumps(now) + "\n")


def write_decontamination_report(folder: Path, lines: Sequence[str]) -> None:
    """A line for each training prompt that was dropped."""
    (folder / DECONTAMINATION_REPORT).write_text("".join(f"{line}\n" for line in lines))


def _report_line(found: Contamination, loaded: PromptSet, problem: str) -> str:
    origin = loaded.origins[found.prompt]
    return json.dumps(
        {
            "place": origin.place,
            "question": origin.question,
            "benchmark": found.benchmark,
            "problem": problem,
            "shared": found.ngram,
        }
    )
