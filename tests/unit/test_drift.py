"""The sample whose log-probs differ most between engine and policy is found, NaN first, and kept token by token."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_gppo.algorithm import samples_from_groups
from megatron_gppo.datatypes import Group, Prompt, Response, Rollout, Sample, ScoredBatch, Verdict
from megatron_gppo.drift import worst_sample, write_alarm
from megatron_gppo.packing import pack_updates
from megatron_gppo.parallel import ParallelState

SINGLE = ParallelState(0, 1, 0, 1, 0, 1, 0, 1, None, None, None, None)
ROLLOUT = Rollout(
    groups=[
        Group(
            Prompt(row, [5, 6], f"prompt {row}", "1", "test"),
            [Response([7, 8, 1], [-1.0, -2.0, -3.0], f"response {row} {i}", "stop", [4] * 3) for i in range(2)],
            [Verdict(0.0, False, "scored"), Verdict(1.0, True, "scored")],
        )
        for row in range(2)
    ],
    counts={},
    seconds={},
)


def scored(differences: list[float]) -> tuple[list[ScoredBatch], list[Sample]]:
    """Four samples, one a micro-batch, whose policy log-probs are the engine's plus a difference."""
    samples = samples_from_groups(ROLLOUT.groups)
    (update,) = pack_updates(samples, groups_per_update=2, dp_rank=0, dp_size=1, tokens_per_microbatch=5, alignment=1)
    logprobs = [batch.rollout_logprobs + differences[batch.sample_indices[0]] for batch in update.microbatches]
    return [ScoredBatch(update, logprobs)], samples


def test_the_worst_sample_is_kept(tmp_path: Path) -> None:
    worst = worst_sample(*scored([0.1, -0.2, 1.5, 0.3]), SINGLE)
    assert worst is not None
    assert worst.index == 2
    assert worst.difference == pytest.approx(1.5)
    record = json.loads(write_alarm(tmp_path / "alarms", 7, worst, ROLLOUT).read_text())
    assert (record["step"], record["prompt"], record["response"]) == (7, "prompt 1", "response 1 0")
    assert record["engine_logprobs"] == [-1.0, -2.0, -3.0]
    assert record["policy_logprobs"] == pytest.approx([0.5, -0.5, -1.5])


@pytest.mark.parametrize("place", range(4))
def test_nan_is_worse_than_any_number(place: int) -> None:
    differences = [9.0, 0.1, 0.2, 5.0]
    differences[place] = float("nan")
    worst = worst_sample(*scored(differences), SINGLE)
    assert worst is not None
    assert worst.index == place
    assert np.isnan(worst.difference)


def test_without_samples_there_is_none() -> None:
    assert worst_sample([], [], SINGLE) is None
