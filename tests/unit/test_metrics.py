"""Scalars from a step's types, against hand-computed values, and what lands in TensorBoard and on the console."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gppo import metrics
from megatron_gppo.algorithm import InForce, policy_loss
from megatron_gppo.config import LossConfig
from megatron_gppo.datatypes import EntropyPoint, Group, Outcome, Prompt, Response, Rollout, UpdateStats, Verdict
from megatron_gppo.metrics import TAG_FAMILIES, TAGS, MetricsLogger, Phases, is_documented
from megatron_gppo.rollout.generate import COUNTS
from megatron_gppo.scalars import (
    EVENTS,
    in_force_scalars,
    rollout_scalars,
    sample_texts,
    staleness_scalars,
    step_histograms,
    step_scalars,
    update_scalars,
)

LOSS = LossConfig(beta1=0.5, beta2=1.0, clip_low=0.2, clip_high=0.2, importance_correction="truncated")


def make_group(row: int, rewards: list[float], lengths: list[int], outcomes: list[Outcome] | None = None) -> Group:
    return Group(
        prompt=Prompt(row=row, token_ids=[1, 2, 3], text=f"prompt {row}", ground_truth="42", data_source="arithmetic"),
        responses=[
            Response(
                token_ids=[7] * length,
                logprobs=[-0.1] * length,
                text=f"response\n```{length}```",
                finish_reason="length" if length >= 10 else "stop",
                policy_versions=[1] * length,
            )
            for length in lengths
        ],
        verdicts=[
            Verdict(reward=reward, correct=reward > 0.5, outcome=outcome)
            for reward, outcome in zip(rewards, outcomes or ["scored"] * len(rewards), strict=True)
        ],
    )


def make_rollout() -> Rollout:
    return Rollout(
        groups=[
            make_group(5, [1.0, 0.0], [4, 10]),
            make_group(9, [0.0, 0.0], [2, 6], ["timeout", "unparsable"]),
        ],
        counts={"dropped_groups": 3, "retried_requests": 1, "reward_timeout": 1, "reward_unparsable": 1},
        seconds={"generate": 2.0, "reward": 0.5},
    )


def make_stats(*, ratios: list[float], lr: float = 1e-4, grad_norm: float = 1.0, skipped: bool = False) -> UpdateStats:
    """Of an update with one token a ratio, through the real loss."""
    logprobs = torch.log(torch.tensor(ratios)) - 1.0
    output = policy_loss(
        LOSS,
        logprobs=logprobs,
        old_logprobs=torch.full_like(logprobs, -1.0),
        advantages=torch.ones_like(logprobs),
        loss_mask=torch.ones(len(ratios), dtype=torch.bool),
        denominator=len(ratios),
        entropy=torch.full_like(logprobs, 0.25),
        ref_logprobs=torch.full_like(logprobs, -1.0),
        rollout_logprobs=torch.linspace(-1.5, -1.0, len(ratios)),
    )
    return UpdateStats(
        sums={key: value.item() for key, value in output.metrics.items()},
        maxima={key: value.item() for key, value in output.maxima.items()},
        ratio_histogram=output.ratio_histogram.tolist(),
        num_loss_tokens=len(ratios),
        loss=output.loss.item(),
        grad_norm=grad_norm,
        lr=lr,
        skipped=skipped,
    )


NO_TOKENS = UpdateStats({}, {}, [], 0, loss=0.0, grad_norm=0.0, lr=3e-4, skipped=True)


def read_tensorboard(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def make_logger(run_dir: Path, output: io.StringIO | None = None, **settings: int) -> MetricsLogger:
    console = Console(file=output or io.StringIO(), width=200)
    return MetricsLogger(run_dir, **{"first_step": 1, "num_steps": 60, **settings}, console=console)


def test_rollout_scalars() -> None:
    scalars = rollout_scalars(4, make_rollout())
    assert scalars == {
        "reward/mean": 0.25,
        "reward/std": pytest.approx(np.std([1, 0, 0, 0])),
        "reward/accuracy": 0.25,
        "reward/timeouts": 1,
        "reward/crashes": 0,
        "reward/unparsable": 1,
        "response/tokens_mean": 5.5,
        "response/tokens_max": 10,
        "response/truncated_share": 0.25,
        "rollout/groups": 2,
        "rollout/degenerate_groups": 1,
        "rollout/dropped_groups": 3,
        "rollout/missing_groups": 0,
        "rollout/surplus_groups": 0,
        "rollout/retried_requests": 1,
        "rollout/timed_out_requests": 0,
        "rollout/carried_on_responses": 0,
        "rollout/staleness_mean": 2.0,  # step 4 starts from version 3, and these are of version 1
        "rollout/staleness_max": 2.0,
        "rollout/mixed_responses": 0.0,
        "rollout/moved_requests": 0,
        "rollout/malformed_answers": 0,
        "rollout/lost_engines": 0,
        "rollout/lost_routers": 0,
        "rollout/restarted_engines": 0,
        "rollout/serving_engines": 0,
        "rollout/aborted_groups": 0,
        "seconds/generate": 2.0,
        "seconds/reward": 0.5,
        "throughput/generated_tokens_per_s": 11.0,
    }


def test_ages_are_of_tokens() -> None:
    """Step 4 starts from version 3."""
    responses = [
        Response([7] * len(versions), [-0.1] * len(versions), "", "stop", versions)
        for versions in ([1], [2, 2, 3], [3, 3, 3, 3])
    ]
    assert staleness_scalars(4, responses) == {
        "rollout/staleness_mean": 0.5,
        "rollout/staleness_max": 2.0,
        "rollout/mixed_responses": pytest.approx(1 / 3),
    }


class CountedReads(Sequence[int]):
    """Versions by token that count how many of them were looked at."""

    def __init__(self, versions: list[int]) -> None:
        self.versions, self.reads = versions, 0

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return self.versions[index]


def test_staleness_does_not_read_every_token() -> None:
    versions = CountedReads([4] * 10_000 + [5] * 6_384)
    response = Response([7] * 16_384, [-0.1] * 16_384, "", "length", cast(list[int], versions))
    scalars = staleness_scalars(6, [response] * 4)
    assert scalars["rollout/staleness_mean"] == pytest.approx(10_000 / 16_384)
    assert versions.reads < 4 * 100


def test_staleness_of_any_runs_of_versions() -> None:
    rng = np.random.default_rng(0)
    versions = [sorted(rng.integers(0, 4, size=rng.integers(1, 30)).tolist()) for _ in range(50)]
    scalars = staleness_scalars(4, [Response(each, [], "", "stop", each) for each in versions])
    ages = 3 - np.concatenate(versions)
    assert scalars["rollout/staleness_mean"] == pytest.approx(ages.mean())
    assert scalars["rollout/staleness_max"] == ages.max()
    assert scalars["rollout/mixed_responses"] == np.mean([len(set(each)) > 1 for each in versions])


def test_every_event_that_a_rollout_counts_is_logged() -> None:
    assert set(EVENTS) == set(COUNTS)


def test_rollout_without_groups_has_its_counts() -> None:
    scalars = rollout_scalars(1, Rollout(groups=[], counts={"dropped_groups": 4}, seconds={}))
    assert scalars["rollout/dropped_groups"] == 4
    assert scalars["rollout/groups"] == 0
    assert "reward/mean" not in scalars


def test_update_scalars_are_means_over_the_tokens_of_all_updates() -> None:
    updates = [
        make_stats(ratios=[1.0, 1.0], lr=1e-4, grad_norm=1.0),
        make_stats(ratios=[0.5, 0.9, 1.1, 1.5, 2.0, 1.0], lr=2e-4, grad_norm=3.0),
    ]
    scalars = update_scalars(updates)
    ratios = np.array([1.0, 1.0, 0.5, 0.9, 1.1, 1.5, 2.0, 1.0])
    assert scalars["ratio/mean"] == pytest.approx(ratios.mean(), rel=1e-6)
    assert scalars["ratio/max"] == pytest.approx(2.0, rel=1e-6)
    assert scalars["ratio/left_of_clip"] == 1 / 8
    assert scalars["ratio/right_of_clip"] == 2 / 8
    assert scalars["ratio/left_of_clip_acting"] == 0.0
    assert scalars["ratio/right_of_clip_acting"] == 2 / 8
    assert scalars["ratio/first_update_max_deviation"] == pytest.approx(0.0, abs=1e-6)
    assert scalars["policy/kl"] == pytest.approx((ratios - 1 - np.log(ratios)).mean(), rel=1e-5)
    assert scalars["policy/entropy"] == 0.25
    assert scalars["policy/grad_norm"] == 2.0
    assert scalars["policy/grad_norm_max"] == 3.0
    assert scalars["policy/lr"] == 2e-4
    assert scalars["policy/updates"] == 2
    assert scalars["policy/loss"] == pytest.approx((updates[0].loss + updates[1].loss) / 2)
    assert scalars["engine/logprob_difference_max"] == pytest.approx(0.5)
    assert scalars["engine/logprob_difference_bias"] == pytest.approx(0.25)


def test_values_in_force() -> None:
    loss = LossConfig(beta1=0.25, beta2=1.0, clip_low=0.1, clip_high=0.3, entropy_coef=0.01)
    assert in_force_scalars([InForce(loss, lr=1e-6, entropy_target=0.4)] * 2) == {
        "algorithm/beta1": 0.25,
        "algorithm/beta2": 1.0,
        "algorithm/clip_low": 0.1,
        "algorithm/clip_high": 0.3,
        "algorithm/entropy_coef": 0.01,
        "algorithm/entropy_target": 0.4,
    }
    without_betas = in_force_scalars([InForce(LossConfig(objective="dapo"), lr=1e-6, entropy_target=None)])
    assert set(without_betas) == {"algorithm/clip_low", "algorithm/clip_high", "algorithm/entropy_coef"}
    assert in_force_scalars([]) == {}


def test_importance_correction_is_averaged_over_tokens() -> None:
    """The engine's log-probs in make_stats are from 0.5 nats below the old policy's to equal."""
    scalars = update_scalars([make_stats(ratios=[1.0, 1.0]), make_stats(ratios=[1.0])])
    assert scalars["engine/importance_weight"] == pytest.approx((2 * math.exp(0.5) + 1.0) / 3)
    assert scalars["engine/importance_corrected"] == 0.0
    effective = (2 * math.exp(0.5) + 1.0) ** 2 / (3 * (2 * math.exp(1.0) + 1.0))
    assert scalars["engine/importance_effective_sample_size"] == pytest.approx(effective)


def test_first_update_deviation_is_that_of_the_first_update() -> None:
    drifted = update_scalars([make_stats(ratios=[1.0, 0.75]), make_stats(ratios=[3.0])])
    assert drifted["ratio/first_update_max_deviation"] == pytest.approx(0.25, rel=1e-6)
    without_tokens = update_scalars([NO_TOKENS, make_stats(ratios=[3.0])])
    assert "ratio/first_update_max_deviation" not in without_tokens


def test_dynamics_are_shares_over_all_updates() -> None:
    """One token at ratio 1 (log-prob -1) and one right of the clip range, with beta2 = 1: F = 1 and 1.2."""
    scalars = update_scalars([make_stats(ratios=[1.0]), make_stats(ratios=[2.0])])
    likelier = 2 * math.exp(-1)
    assert (scalars["quadrant/pa_lp_tokens"], scalars["quadrant/pa_hp_tokens"]) == (0.5, 0.5)
    assert scalars["quadrant/pa_hp_gradient"] == pytest.approx(1.2 / 2.2)
    assert scalars["quadrant/na_hp_gradient"] == 0.0
    assert scalars["ratio/right_of_clip_gradient"] == pytest.approx(1.2 / 2.2)
    assert scalars["ratio/effective_sample_size"] == pytest.approx(9 / (2 * 5))
    assert scalars["probability/clipped"] == pytest.approx(likelier)
    assert scalars["probability/unclipped"] == pytest.approx(math.exp(-1))
    without_clipped = update_scalars([make_stats(ratios=[1.0])])
    assert "probability/clipped" not in without_clipped


def test_histograms_reach_tensorboard(tmp_path: Path) -> None:
    histograms = step_histograms([make_stats(ratios=[1.0, 1.01]), NO_TOKENS, make_stats(ratios=[0.5, 1.0])])
    with make_logger(tmp_path) as logger:
        logger.log_step(4, {}, histograms=histograms)
    (event,) = read_tensorboard(tmp_path).Histograms("ratio/histogram")
    value = event.histogram_value
    assert (event.step, value.num, value.sum) == (4, 4, pytest.approx(3.51))
    counts = {round(limit, 4): count for limit, count in zip(value.bucket_limit, value.bucket, strict=True) if count}
    assert counts == {round(math.exp(-0.65), 4): 1, 1.0: 2, round(math.exp(0.05), 4): 1}
    assert step_histograms([NO_TOKENS]) == {}


def test_skipped_updates() -> None:
    updates = [
        make_stats(ratios=[1.0], grad_norm=2.0),
        make_stats(ratios=[1.0], grad_norm=math.nan, skipped=True),
        NO_TOKENS,
    ]
    scalars = update_scalars(updates)
    assert (scalars["policy/updates"], scalars["policy/skipped_updates"]) == (3, 2)
    assert scalars["policy/grad_norm"] == scalars["policy/grad_norm_max"] == 2.0
    assert update_scalars([NO_TOKENS]) == {"policy/updates": 1, "policy/skipped_updates": 1, "policy/lr": 3e-4}
    assert update_scalars([]) == {"policy/updates": 0, "policy/skipped_updates": 0}


def test_a_maximum_that_is_not_a_number_stays_visible() -> None:
    updates = [make_stats(ratios=[1.5]), make_stats(ratios=[math.nan]), make_stats(ratios=[1.5])]
    assert math.isnan(update_scalars(updates)["ratio/max"])


def test_what_is_logged_is_what_is_documented(tmp_path: Path) -> None:
    phases = Phases()
    for phase in ("rollout", "score", "train", "sync", "checkpoint"):
        with phases(phase):
            pass
    rollout = make_rollout()
    updates = [make_stats(ratios=[1.0, 1.5])]
    trace = [EntropyPoint(0.1, 1.0), EntropyPoint(0.2, 0.9), EntropyPoint(0.3, 0.7), EntropyPoint(0.1, 0.6)]
    scalars = step_scalars(4, rollout, updates, trace, phases.seconds)
    scalars |= in_force_scalars([InForce(LOSS, lr=1e-6, entropy_target=0.4)]) | {"engine/routing_difference": 0.0}
    with make_logger(tmp_path) as logger:
        logger.log_step(1, scalars, sample_texts(rollout, 2), step_histograms(updates))
    tags = read_tensorboard(tmp_path).Tags()
    logged = {*tags["scalars"], *tags["histograms"], *(tag.removesuffix("/text_summary") for tag in tags["tensors"])}
    only_with_cuda = {"memory/gpu_peak_gib"}
    assert logged - only_with_cuda == set(TAGS) - only_with_cuda
    assert all(TAGS.values())


def test_undocumented_tag_is_refused(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger, pytest.raises(AssertionError, match="reward/median"):
        logger.log_step(1, {"reward/median": 0.5})


def test_values_reach_tensorboard(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log_step(step, {"reward/mean": step / 4})
    events = read_tensorboard(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert events.Scalars("memory/resident_gib")[0].value > 0.01


def test_resumed_run_replaces_the_curves_from_there_on(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger:
        for step in (1, 2, 3, 4):
            logger.log_step(step, {"reward/mean": 0.0})
    with make_logger(tmp_path, first_step=3) as logger:
        for step in (3, 4, 5):
            logger.log_step(step, {"reward/mean": 1.0})
    events = read_tensorboard(tmp_path).Scalars("reward/mean")
    assert [(event.step, event.value) for event in events] == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_heading_and_line_have_the_same_columns(tmp_path: Path) -> None:
    output = io.StringIO()
    with make_logger(tmp_path, output) as logger:
        for step in range(1, 22):
            logger.log_step(
                step,
                step_scalars(step, make_rollout(), [make_stats(ratios=[1.0, 2.0])], [], {"step": 10.0, "train": 7.5}),
            )
    lines = output.getvalue().splitlines()
    assert [number for number, line in enumerate(lines) if line.lstrip().startswith("step")] == [0, 21]
    assert len(lines) == 23
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[1].split() == [
        "1/60",
        "0.250",
        "5.5",
        "0.2500",
        "0.00",
        "50.00",
        "1.5e-01",
        "1",
        "-",
        "7.5",
        "-",
        "3",
        "0:09:50",
    ]
    assert lines[-1].split()[-1] == "0:06:30"


def test_progress_in_a_log_file_is_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    with make_logger(tmp_path, output) as logger:
        for done in (0, 1, 2):
            logger.on_progress(done, 2)
        assert output.getvalue() == ""
        monkeypatch.setattr(metrics, "SECONDS_PER_PROGRESS_LINE", 0.0)
        logger.on_progress(1, 2)
        logger.on_progress(2, 2)
    assert output.getvalue().splitlines() == [
        "generating: 1/2 groups after 0 s",
        "generating: 2/2 groups after 0 s",
    ]


def test_progress_bar_in_a_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with MetricsLogger(tmp_path, first_step=1, num_steps=2, console=console) as logger:
        for step in (1, 2):
            for done in (0, 1, 2, 3):
                logger.on_progress(done, 4 if step == 1 else 3)
            logger.log_step(step, {})  # ends the first bar, which was still waiting for a group
        drawn = output.getvalue()
    assert "generating" in drawn
    assert "3/4" in drawn
    assert "3/3" in drawn
    assert "\x1b[?25h" in drawn[drawn.rindex("3/3") :], "the cursor is shown again"


def test_phases_add_up_and_survive_an_error() -> None:
    phases = Phases()
    with phases("train"):
        pass
    first = phases.seconds["train"]
    with pytest.raises(RuntimeError), phases("train"):
        raise RuntimeError
    seconds = phases.seconds
    assert seconds["train"] > first > 0
    assert seconds["step"] >= seconds["train"]


def test_sample_texts() -> None:
    texts = sample_texts(make_rollout(), 5)
    assert len(texts) == 2
    assert texts[0].startswith("**reward 1, correct, ground truth 42, 4 tokens, finish reason stop, row 5**")
    assert "    prompt 5" in texts[0]
    assert "    response\n    ```4```" in texts[0]
    assert "**reward 0, timeout, incorrect" in texts[1]
    assert sample_texts(make_rollout(), 0) == []
    spread = Rollout(groups=[make_group(row, [0.0], [1]) for row in range(9)], counts={}, seconds={})
    assert [text.split("row ")[1][0] for text in sample_texts(spread, 3)] == ["0", "3", "6"]


def test_the_readme_lists_every_tag_with_its_meaning() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for tag, meaning in {**TAGS, **TAG_FAMILIES}.items():
        assert readme.count(f"| `{tag}` | {meaning.replace('|', chr(92) + '|')} |") == 1, tag


def test_tags_with_a_name_in_them() -> None:
    assert is_documented("eval/aime24/accuracy")
    assert is_documented("reward_part/overlong")
    assert not is_documented("eval/aime24/median")
    assert not is_documented("eval/a/b/accuracy")


def test_parts_of_a_reward(tmp_path: Path) -> None:
    group = make_group(0, [1.0, 0.0], [1, 1])
    verdicts = [Verdict(0.5, True, "scored", None, {"answer": 1.0, "overlong": -0.5})] * 2
    rollout = Rollout([Group(group.prompt, group.responses, verdicts)], {}, {})
    found = rollout_scalars(2, rollout)
    assert (found["reward_part/answer"], found["reward_part/overlong"]) == (1.0, -0.5)
    assert not any(tag.startswith("reward_part") for tag in rollout_scalars(4, make_rollout()))


def test_an_evaluation_is_logged_at_its_step(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger:
        logger.log_evaluation(0, {"eval/aime24/accuracy": 0.25}, "evaluation at step 0: aime24 25.0 %")
    (event,) = read_tensorboard(tmp_path).Scalars("eval/aime24/accuracy")
    assert (event.step, event.value) == (0, 0.25)
