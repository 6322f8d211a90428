"""The plan's activations against what autograd keeps in a real Megatron model while it trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gppo.algorithm import values_in_force
from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture
from megatron_gppo.datatypes import Sample
from megatron_gppo.memory import activations_of_stage
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, leave_model_parallel, make_config, pack
from tests.support.saved_bytes import SavedBytes
from tests.support.tiny import make_tiny_model

TOKENS = 256  # of a sample, which fills a micro-batch
SAMPLES = 8
TOLERANCE = 0.08
# (architecture, layout over two ranks, recompute). Experts are equally loaded only where one rank has all of them.
CASES = [
    ("Qwen2ForCausalLM", "dp2", "none"),
    ("Qwen2ForCausalLM", "dp2", "full"),
    ("Qwen3ForCausalLM", "tp2_sp", "none"),
    ("Qwen3ForCausalLM", "tp2", "full"),
    ("Qwen3ForCausalLM", "pp2", "none"),
    ("Qwen2ForCausalLM", "pp2", "full"),
    ("Qwen2ForCausalLM", "pp2_vpp2", "none"),
    ("Qwen2ForCausalLM", "pp2_vpp2", "full"),
    ("Qwen2ForCausalLM", "cp2", "none"),
    ("Qwen3MoeForCausalLM", "dp2", "none"),
    ("Qwen3MoeForCausalLM", "dp2", "full"),
]


def config_of(folder: Path, layout: str, recompute: str) -> Config:
    return make_config(
        folder,
        LAYOUTS[layout],
        rollout={"prompts_per_step": 2, "max_response_tokens": TOKENS - 32},
        train={"prompts_per_update": 2, "tokens_per_microbatch": TOKENS, "recompute": recompute},
    )


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    return [
        Sample(
            group=index % 2,
            prompt_ids=generator.integers(1, 65, 32),
            response_ids=generator.integers(1, 65, TOKENS - 32),
            rollout_logprobs=np.full(TOKENS - 32, -4.0, dtype=np.float32),
            advantage=1.0 - index % 2 * 2.0,
            correct=True,
            masked=False,
        )
        for index in range(SAMPLES)
    ]


def measure(rank: int, cases: list[tuple[Path, str, str]]) -> list[tuple[int, int, int]]:
    """(bytes that autograd kept at the most, pipeline stage, micro-batches) of this rank for each case."""
    return [_measure_case(config_of(*case)) for case in cases]


def _measure_case(config: Config) -> tuple[int, int, int]:
    policy = build_policy(config)
    updates = pack(policy, samples())
    assert {len(batch.input_ids) for batch in updates[0].microbatches} == {TOKENS}
    batch = policy.add_old_logprobs(updates)[0]
    saved = SavedBytes([parameter for model in policy.models for parameter in model.parameters()])
    with saved.recording():
        policy.update(batch, values_in_force(config, 1, range(1), None)[0])
    measured = saved.peak, policy.parallel.pp_rank, len(updates[0].microbatches)
    leave_model_parallel()
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """For each case: the model's folder, and what each of the two ranks measured."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: make_tiny_model(folder / name, name) for name in sorted({case[0] for case in CASES})}
    by_rank = run_ranks(2, measure, [(models[name], layout, recompute) for name, layout, recompute in CASES])
    return {case: (models[case[0]], ranks) for case, *ranks in zip(CASES, *by_rank, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_activations_are_what_autograd_keeps(
    measured: dict[tuple[str, str, str], Any], case: tuple[str, str, str]
) -> None:
    folder, ranks = measured[case]
    config, architecture = config_of(folder, *case[1:]), Architecture.from_hf(folder)
    for peak, stage, num_microbatches in ranks:
        planned = activations_of_stage(config, architecture, stage, num_microbatches, fused=False).saved
        assert planned == pytest.approx(peak, rel=TOLERANCE), (
            f"stage {stage}: planned / measured = {planned / peak:.3f}"
        )
