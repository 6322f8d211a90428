"""Optimizer steps of the real policy: what moves, what does not, and what is counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gppo.algorithm import values_in_force
from megatron_gppo.datatypes import ScoredBatch
from megatron_gppo.policy import Policy
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, leave_model_parallel, make_config, make_samples, pack
from tests.support.tiny import make_tiny_model


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in policy.shards().items()}


def unchanged(policy: Policy, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], shard) for name, shard in policy.shards().items())


def with_advantages(batch: ScoredBatch, value: float) -> ScoredBatch:
    """The batch with one token's advantage replaced, where this rank has a token."""
    first, *others = batch.update.microbatches
    advantages = first.advantages.clone()
    advantages[first.loss_mask.nonzero()[:1]] = value
    return replace(batch, update=replace(batch.update, microbatches=[replace(first, advantages=advantages), *others]))


def update(rank: int, hf_folder: Path, layouts: list[str]) -> dict[str, Any]:
    results = {}
    for layout in layouts:
        config = make_config(hf_folder, LAYOUTS[layout], optimizer={"lr": 4e-3, "warmup_updates": 3})
        policy = build_policy(config)
        samples = make_samples(8, 4, policy.architecture.vocab_size)
        batches = policy.add_old_logprobs(pack(policy, samples))

        before = weights(policy)
        in_force = values_in_force(config, step=1, updates=range(6), control=None)
        # One rank's bad token must stop all of them.
        poisoned = with_advantages(batches[0], float("nan")) if policy.parallel.dp_rank == 0 else batches[0]
        skipped = policy.update(poisoned, in_force[0])
        assert unchanged(policy, before)
        masked = policy.add_old_logprobs(pack(policy, [replace(sample, masked=True) for sample in samples]))
        empty = policy.update(masked[0], in_force[1])
        assert unchanged(policy, before)

        moving = [policy.update(*each) for each in zip([*batches, *batches], in_force[2:], strict=True)]
        assert not unchanged(policy, before)
        results[layout] = skipped, empty, moving
        leave_model_parallel()
    return results


@pytest.mark.parametrize(("world_size", "layouts"), [(2, ["tp2_sp", "pp2_vpp2", "dp2", "cp2"]), (4, ["tp2_dp2"])])
def test_updates(tmp_path: Path, world_size: int, layouts: list[str]) -> None:
    ranks = run_ranks(world_size, update, make_tiny_model(tmp_path / "model"), layouts)
    for layout in layouts:
        skipped, empty, moving = ranks[0][layout]
        assert skipped.skipped, layout
        assert not torch.tensor(skipped.grad_norm).isfinite()
        assert empty.skipped
        assert empty.num_loss_tokens == 0
        assert not any(stats.skipped for stats in moving)
        assert moving[0].maxima["abs_ratio_minus_one"] < 1e-5, "the first update starts at the scored policy"
        later = moving[-1].sums
        assert later["left_of_clip"] + later["right_of_clip"] > 0, "later updates leave the clip range"
        # lr * (k + 1) / (warm-up + 1); updates that move nothing count.
        rates = [stats.lr for stats in [skipped, empty, *moving]]
        assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 4e-3])
        for rank in ranks[1:]:
            assert rank[layout][2] == moving, "every rank tells the same"
