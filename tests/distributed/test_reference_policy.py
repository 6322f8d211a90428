"""The reference policy: scores with the weights that it was made from, and leaves no trace in the policy."""

from pathlib import Path

import pytest
import torch

from megatron_gppo.algorithm import values_in_force
from megatron_gppo.policy import Policy
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, leave_model_parallel, make_config, make_samples, pack
from tests.support.tiny import make_tiny_model


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in policy.named_parameters()}


def train(hf_folder: Path, layout: str, dtype: str, *, with_reference: bool) -> dict[str, torch.Tensor]:
    """The weights after two steps of two updates, with the checks of every step's reference log-probs."""
    config = make_config(
        hf_folder, LAYOUTS[layout], model={"dtype": dtype}, optimizer={"lr": 1e-2, "warmup_updates": 0}
    )
    policy = build_policy(config)
    samples = make_samples(8, 4, policy.architecture.vocab_size)
    if with_reference:
        policy.keep_reference()
    initial = None
    for step in (1, 2):
        before = weights(policy)
        batches = policy.add_old_logprobs(pack(policy, samples))
        for name, parameter in policy.named_parameters():
            assert torch.equal(parameter, before[name]), name
        old = torch.cat([logprobs for batch in batches for logprobs in batch.old_logprobs])
        initial = old if initial is None else initial
        if with_reference:
            reference = torch.cat([logprobs for batch in batches for logprobs in batch.ref_logprobs or []])
            assert torch.equal(reference, initial)
            if step == 2:
                assert (reference - old).abs().max() > 0.01, "the policy has moved"
        else:
            assert all(batch.ref_logprobs is None for batch in batches)
        in_force = values_in_force(config, step, range(2 * step - 2, 2 * step), control=None)
        for batch, values in zip(batches, in_force, strict=True):
            assert not policy.update(batch, values).skipped
    leave_model_parallel()
    return weights(policy)


def compare(rank: int, hf_folder: Path, layouts: list[tuple[str, str]]) -> bool:
    for layout, dtype in layouts:
        alone = train(hf_folder, layout, dtype, with_reference=False)
        beside_a_reference = train(hf_folder, layout, dtype, with_reference=True)
        for name in alone:
            assert torch.equal(alone[name], beside_a_reference[name]), (layout, name)
    return True


@pytest.mark.parametrize("tied", [True, False])
def test_scores_as_at_the_start_and_leaves_no_trace(tmp_path: Path, tied: bool) -> None:
    """dp2 shards the optimizer, whose fp32 shards are views of the weights; a tied embedding has a copy on the last stage."""
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    layouts = [("dp2", "fp32"), ("pp2", "bf16")] if tied else [("tp2_sp", "fp32"), ("pp2_vpp2", "fp32")]
    assert all(run_ranks(2, compare, folder, layouts))
