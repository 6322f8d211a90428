"""The plan of a run against hand-computed numbers, and the layouts and batches that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gppo.config import Config, ConfigError, parse_config
from megatron_gppo.convert import Architecture
from megatron_gppo.plan import make_plan, render
from tests.support.tiny import make_tiny_model

# Small enough to count by hand: 4 query heads and 2 KV heads of 2, so that q is 8 x 8 and k and v are 4 x 8.
TINY = Architecture(
    name="Qwen2ForCausalLM",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=11,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    dtype=torch.float32,
)
VOCABULARY = 11 * 8
MATRICES = (8 + 4 + 4) * 8 + 8 * 8 + 3 * 12 * 8  # qkv, output projection, gate up down: each is cut by tp
QKV_BIAS = 8 + 4 + 4
NORMS = 2 * 8
LAYER = MATRICES + QKV_BIAS + NORMS
FINAL_NORM = 8


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"hf_path": "model", "dtype": "bf16"},
        "run": {"dir": "run"},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 32, "responses_per_prompt": 4, "max_response_tokens": 128},
        "train": {"steps": 10, "prompts_per_update": 8, "tokens_per_microbatch": 512},
        "algorithm": {"preset": "paper"},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return parse_config(tree)


def test_batches_and_steps() -> None:
    plan = make_plan(make_config(parallel={"tp": 2, "pp": 2}), TINY, world_size=8)
    assert plan.dp == 2
    assert plan.samples_per_step == 32 * 4
    assert plan.samples_per_update == 8 * 4
    assert plan.longest_sample == 64 + 128
    assert plan.optimizer_steps == 10 * 4


@pytest.mark.parametrize(
    ("layout", "per_rank"),
    [
        ({}, 2 * VOCABULARY + 4 * LAYER + FINAL_NORM),
        ({"pp": 2}, VOCABULARY + 2 * LAYER + FINAL_NORM),
        ({"pp": 2, "vpp": 2}, VOCABULARY + 2 * LAYER + FINAL_NORM),
        # 11 rows of the vocabulary become 12: 6 on each rank.
        ({"tp": 2}, 2 * 6 * 8 + 4 * (MATRICES // 2 + QKV_BIAS // 2 + NORMS) + FINAL_NORM),
    ],
    ids=["tp1", "pp2", "pp2 vpp2", "tp2"],
)
def test_parameters_per_rank(layout: dict[str, int], per_rank: int) -> None:
    plan = make_plan(make_config(parallel=layout), TINY, world_size=4)
    assert max(stage.parameters for stage in plan.stages) == per_rank
    assert plan.num_parameters == 2 * VOCABULARY + 4 * LAYER + FINAL_NORM


def test_last_stage_of_a_tied_model_holds_a_copy_of_the_embedding(tmp_path: Path) -> None:
    tied = Architecture.from_hf(make_tiny_model(tmp_path / "tied", tie_word_embeddings=True))
    untied = Architecture.from_hf(make_tiny_model(tmp_path / "untied"))
    config = make_config(parallel={"pp": 2})
    plans = [make_plan(config, architecture, world_size=2) for architecture in (tied, untied)]
    assert [stage.parameters for stage in plans[0].stages] == [stage.parameters for stage in plans[1].stages]
    assert plans[0].num_parameters < plans[1].num_parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_total_is_that_of_the_hf_files(tmp_path: Path, architecture: str, tied: bool) -> None:
    folder = make_tiny_model(tmp_path, architecture, tie_word_embeddings=tied)
    in_files = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert make_plan(make_config(), Architecture.from_hf(folder), world_size=1).num_parameters == in_files


@pytest.mark.parametrize(
    ("dtype", "distributed", "weight_bytes", "optimizer_bytes"),
    [("bf16", True, 2, 12 // 2), ("bf16", False, 2, 12), ("fp32", True, 4, 8 // 2), ("fp32", False, 4, 8)],
)
def test_memory(dtype: str, distributed: bool, weight_bytes: int, optimizer_bytes: int) -> None:
    config = make_config(model={"dtype": dtype}, optimizer={"distributed": distributed})
    plan = make_plan(config, TINY, world_size=2)
    count = plan.num_parameters
    memory = plan.memory
    assert (memory.weights, memory.gradients) == (count * weight_bytes, count * 4)
    assert memory.optimizer == count * optimizer_bytes
    assert memory.total == count * (weight_bytes + 4 + optimizer_bytes) + memory.activations + memory.working


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2), ("fp32", 4)])
def test_memory_of_a_reference_policy(dtype: str, bytes_each: int) -> None:
    """A copy of the rank's weights, in host memory: it does not count where activations have to fit, too."""
    config = make_config(model={"dtype": dtype}, algorithm={"kl_coef": 0.1})
    plan, without = make_plan(config, TINY, world_size=2), make_plan(make_config(model={"dtype": dtype}), TINY, 2)
    assert plan.memory.reference == plan.memory.parameters * bytes_each
    assert plan.memory.total == without.memory.total
    assert f"more on the fullest rank, in host memory: the initial weights ({dtype})" in render(plan)
    assert "reference" not in render(without)


def test_rendered_plan_names_every_number() -> None:
    text = render(make_plan(make_config(parallel={"tp": 2, "pp": 2, "vpp": 2}), TINY, world_size=8))
    for expected in (
        "8 = dp 2 x tp 2 x pp 2 x cp 1, 2 chunks a pipeline rank",
        f"Qwen2ForCausalLM, {2 * VOCABULARY + 4 * LAYER + FINAL_NORM:,} parameters",
        "10 steps, 40 optimizer steps",
        "32 prompts x 4 responses = 128 samples, in 4 updates",
        "8 prompts, 32 samples, at most 6,144 tokens; about 16 samples a data-parallel rank",
        "at most 512 tokens; the longest sample has 192",
        "fp32 master weights and two moments, sharded over dp 2",
        "activations of full micro-batches, recompute: none",
        "not counted: CUDA's context",
        "GiB of weights on each of tp = 1 GPUs",
    ):
        assert expected in text
    assert "sharded" not in render(make_plan(make_config(), TINY, world_size=1))


def test_context_parallel_ranks_share_the_optimizer_but_not_the_samples() -> None:
    plan = make_plan(make_config(parallel={"cp": 2}), TINY, world_size=4)
    assert plan.dp == 2
    assert plan.memory.optimizer == plan.num_parameters * 12 // 4
    assert "4 = dp 2 x tp 1 x pp 1 x cp 2" in render(plan)
    assert "sharded over dp 2 x cp 2" in render(plan)
    assert "sharded over dp 1 x cp 2" in render(make_plan(make_config(parallel={"cp": 2}), TINY, world_size=2))


@pytest.mark.parametrize(
    ("sections", "world_size", "named"),
    [
        ({"parallel": {"tp": 2, "pp": 2}}, 6, ["world size = 6", "= 2 * 2 * 1 = 4", "start e.g. 4 ranks"]),
        ({"parallel": {"tp": 4}}, 2, ["world size = 2", "start e.g. 4 ranks"]),
        ({"parallel": {"tp": 3}}, 3, ["tp = 3", "num_attention_heads = 4", "Fix:"]),
        ({"parallel": {"pp": 8}}, 8, ["pp = 8", "num_hidden_layers = 4", "Fix:"]),
        ({"parallel": {"pp": 2, "vpp": 4}}, 2, ["pp * vpp", "num_hidden_layers = 4", "Fix:"]),
        ({"train": {"prompts_per_update": 2}}, 12, ["8 samples an update", "12 data-parallel", "to at least 3"]),
        ({"data": {"max_prompt_tokens": 1000}, "train": {"tokens_per_microbatch": 2048}}, 1, ["1128 tokens", "1024"]),
        (
            {
                "parallel": {"tp": 4, "sequence_parallel": True},
                "data": {"max_prompt_tokens": 65},
                "train": {"tokens_per_microbatch": 193},
            },
            4,
            ["tokens_per_microbatch = 193 holds 192", "alignment of 4", "raise it to 196"],
        ),
        (
            {
                "parallel": {"tp": 2, "cp": 3, "sequence_parallel": True},
                "data": {"max_prompt_tokens": 65},
                "train": {"tokens_per_microbatch": 197},
            },
            6,
            ["tokens_per_microbatch = 197 holds 192", "alignment of 6", "raise it to 198"],
        ),
        ({"parallel": {"tp": 2, "cp": 2}}, 6, ["world size = 6", "parallel.cp = 2 * 1 * 2 = 4", "start e.g. 4 ranks"]),
    ],
    ids=[
        "world size",
        "too few ranks",
        "tp",
        "pp",
        "vpp",
        "more ranks than samples",
        "longer than the model allows",
        "budget under sequence parallelism",
        "budget under context parallelism",
        "too few ranks for tp and cp",
    ],
)
def test_what_cannot_work(sections: dict[str, dict[str, Any]], world_size: int, named: list[str]) -> None:
    with pytest.raises(ConfigError, match="Fix: ") as error:
        make_plan(make_config(**sections), TINY, world_size)
    for part in named:
        assert part in str(error.value)


# 6 experts of 5, in the place of the MLP.
EXPERTS = replace(
    TINY, num_experts=6, experts_per_token=2, expert_ffn_hidden_size=5, qkv_bias=False, name="Qwen3MoeForCausalLM"
)
EXPERT = 3 * 5 * 8
ROUTER = 6 * 8


def test_experts_are_shared_out_and_their_optimizer_state_over_their_copies() -> None:
    config = make_config(parallel={"tp": 2, "ep": 3, "sequence_parallel": True})
    plan = make_plan(config, EXPERTS, world_size=12)
    matrices = MATRICES - 3 * 12 * 8
    dense = 2 * 6 * 8 + 4 * (matrices // 2 + NORMS + ROUTER) + FINAL_NORM
    experts = 4 * 2 * EXPERT
    assert plan.memory.parameters == dense + experts
    assert plan.num_parameters == 2 * VOCABULARY + 4 * (matrices + NORMS + ROUTER + 6 * EXPERT) + FINAL_NORM
    # tp 2 leaves 6 replicas of the rest; 12 ranks in threes hold 4 copies of the experts.
    assert plan.memory.optimizer == 12 * (-(-dense // 6) + experts // 4)
    assert "experts shared out among 3" in render(plan)


@pytest.mark.parametrize(
    ("parallel", "world_size", "named"),
    [
        ({"ep": 4}, 4, ["ep = 4 does not divide num_experts = 6"]),
        ({"ep": 3}, 4, ["parallel.ep = 3 does not divide the 4 ranks of a pipeline stage", "start e.g. 3 ranks"]),
        ({"tp": 2}, 2, ["parallel.tp = 2 with experts", "parallel.sequence_parallel=true"]),
    ],
)
def test_layouts_that_experts_do_not_admit(parallel: dict[str, int], world_size: int, named: list[str]) -> None:
    with pytest.raises(ConfigError, match="Fix: ") as error:
        make_plan(make_config(parallel=parallel), EXPERTS, world_size)
    for part in named:
        assert part in str(error.value)


def test_smallest_batch_that_every_rank_has_a_part_of() -> None:
    assert make_plan(make_config(train={"prompts_per_update": 2}), TINY, world_size=8).dp == 8
