"""The Megatron policy against HF transformers in one process, and against itself over layouts and micro-batchings.

Bounds are what fp32 gives on tiny models; a layout that is off by 1e-3 is wrong, not imprecise. The layouts of one
world size share their processes, since starting those takes longer than the computation.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gppo.convert import Architecture
from megatron_gppo.packing import unpack
from megatron_gppo.policy import step
from megatron_gppo.policy.optimizer import step as optimizer_step
from tests.support.distributed import run_ranks
from tests.support.policy import (
    LAYOUTS,
    Reference,
    assert_same_gradient,
    build_policy,
    hf_gradients,
    leave_model_parallel,
    main_gradients,
    make_config,
    make_samples,
    pack,
    perturbed_old_logprobs,
)
from tests.support.tiny import make_tiny_model

GROUPS, GROUP_SIZE = 4, 4


def differentiate(rank: int, hf_folders: list[Path], layouts: list[str], budgets: list[int]) -> dict[Any, Any]:
    """Scores, and the gradient of one update, for every model, layout and token budget: runs on each rank."""
    results = {}
    for hf_folder in hf_folders:
        for layout in layouts:
            for budget in budgets:
                config = make_config(
                    hf_folder,
                    LAYOUTS[layout],
                    train={"tokens_per_microbatch": budget},
                    optimizer={"distributed": False},
                )
                policy = build_policy(config)
                samples = make_samples(GROUPS, GROUP_SIZE, policy.architecture.vocab_size)
                updates = pack(policy, samples)
                (scored,) = policy.add_old_logprobs(updates)
                (batch,) = perturbed_old_logprobs(policy, updates, samples)
                for chunk in policy.chunks:
                    chunk.zero_grad_buffer()
                statistics = step.accumulate_gradients(policy.network, batch, config.algorithm.at(1), 48)
                logprobs = unpack(scored.old_logprobs, scored.update.microbatches)
                gradients = main_gradients(policy)
                grad_norm, _ = optimizer_step(policy.optimizer)
                results[hf_folder, layout, budget] = logprobs, gradients, statistics, grad_norm
                leave_model_parallel()
    return results


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tied Qwen2 and an untied Qwen3 cover both embeddings, QKV bias, and query and key norms."""
    return [
        make_tiny_model(tmp_path_factory.mktemp("qwen2"), "Qwen2ForCausalLM", tie_word_embeddings=True),
        make_tiny_model(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM", tie_word_embeddings=False),
    ]


@pytest.mark.parametrize(
    ("world_size", "layouts", "budgets"),
    [
        (1, ["single"], [128, 96, 512]),
        (2, ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2", "cp2"], [128, 96, 512]),
        (4, ["tp4_sp", "tp2_pp2", "tp2_pp2_sp_vpp2", "tp2_dp2", "pp2_dp2", "dp4"], [128, 96, 512]),
        (4, ["cp4", "tp2_cp2", "tp2_cp2_sp", "pp2_cp2", "pp2_vpp2_cp2", "cp2_dp2"], [96, 512]),
    ],
    ids=["1 rank", "2 ranks", "4 ranks", "4 ranks with cp"],
)
def test_every_layout_equals_hf(
    hf_folders: list[Path], world_size: int, layouts: list[str], budgets: list[int]
) -> None:
    check_layouts(hf_folders, world_size, layouts, budgets)


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, ["single"]),
        (2, ["ep2", "tp2_sp_ep2", "tp2_sp", "pp2_vpp2"]),
        (4, ["tp2_sp_ep4", "tp2_pp2_sp", "pp2_ep2", "dp4_ep2", "cp2_ep2"]),
    ],
)
def test_every_layout_of_experts_equals_hf(tmp_path: Path, world_size: int, layouts: list[str]) -> None:
    check_layouts([make_tiny_model(tmp_path, "Qwen3MoeForCausalLM")], world_size, layouts, [128])


def check_layouts(hf_folders: list[Path], world_size: int, layouts: list[str], budgets: list[int]) -> None:
    ranks = run_ranks(world_size, differentiate, hf_folders, layouts, budgets)
    for hf_folder in hf_folders:
        architecture = Architecture.from_hf(hf_folder)
        reference = Reference(make_config(hf_folder))
        samples = make_samples(GROUPS, GROUP_SIZE, architecture.vocab_size)
        expected = reference.gradient(samples)
        for case in (case for case in ranks[0] if case[0] == hf_folder):
            scored: dict[int, Any] = {}
            for rank in ranks:
                scored |= rank[case][0]
            assert sorted(scored) == list(range(len(samples))), case
            for index, sample in enumerate(samples):
                logprobs = reference.logprobs(sample)[0].detach()
                torch.testing.assert_close(torch.from_numpy(scored[index]), logprobs, rtol=0, atol=5e-6, msg=str(case))
            assert_same_gradient(hf_gradients(architecture, [rank[case][1] for rank in ranks]), expected, case)
            norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
            assert [rank[case][3] for rank in ranks] == pytest.approx([norm] * world_size, rel=1e-5), case
            assert all(rank[case][2] == ranks[0][case][2] for rank in ranks), "the statistics differ between ranks"
            assert ranks[0][case][2][1]["num_tokens"] == sum(len(sample.response_ids) for sample in samples)
