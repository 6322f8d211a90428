"""The gradient of the model under every objective is one process's, however the model, the batch and the sequences are cut.

Each objective appears with other aggregations and options, so that all aggregations, KL estimators and bonuses are covered, and
corrections of either kind and every level. Layouts of one world size
share their processes; tests/distributed/test_policy_parity.py compares the same layouts over models and micro-batches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gppo.convert import Architecture
from megatron_gppo.datatypes import Sample
from megatron_gppo.policy import step
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
    perturbation,
    perturbed_old_logprobs,
)
from tests.support.tiny import VOCAB_SIZE, make_tiny_model


@dataclass(frozen=True)
class Case:
    algorithm: dict[str, Any]
    scale: float = 1.0  # of the perturbed log-ratios
    num_samples: int = 16


GSPO_SCALE = 0.0033
CASES = {
    "ce_gppo": Case({"preset": "paper", "kl_coef": 0.1, "importance_correction": "masked"}),
    "ce_gppo, group_token_mean": Case(
        {
            "preset": "released-code",
            "dual_clip": 1.5,
            "aggregation": "group_token_mean",
            "kl_coef": 0.1,
            "kl_estimator": "k1",
        },
    ),
    "ce_gppo, some ranks without a token": Case({"preset": "released-code"}, num_samples=1),
    "ppo_clip": Case(
        {
            "preset": "grpo",
            "entropy_coef": 0.01,
            "importance_correction": "truncated",
            "importance_level": "geometric",
        }
    ),
    "dapo": Case({"preset": "dapo", "kl_coef": 0.1, "kl_estimator": "k2"}),
    "cispo": Case(
        {
            "preset": "cispo",
            "aggregation": "seq_mean_token_sum_norm",
            "importance_correction": "truncated",
            "importance_level": "sequence",
        },
    ),
    "gspo": Case({"preset": "gspo"}, GSPO_SCALE),
    "gspo, token_mean": Case(
        {"preset": "gspo", "aggregation": "token_mean", "importance_correction": "masked", "nll_coef": 0.1},
        GSPO_SCALE,
    ),
}
# Token budget, and whether the samples come in reverse. 96 tokens hold two or three samples, 512 most of them.
PACKINGS = [(96, False), (512, True)]


def samples_of(case: Case, reverse: bool = False) -> list[Sample]:
    samples = make_samples(4, 4, VOCAB_SIZE)[: case.num_samples]
    return samples[::-1] if reverse else samples


def differentiate(rank: int, hf_folder: Path, layouts: list[str]) -> dict[tuple[str, str], Any]:
    """Gradient of one update by layout and case: runs on each rank. Layouts and cases take turns with the packings."""
    results = {}
    for number, layout in enumerate(layouts):
        config = make_config(hf_folder, LAYOUTS[layout], optimizer={"distributed": False})
        policy = build_policy(config)
        for index, (name, case) in enumerate(CASES.items()):
            budget, reverse = PACKINGS[(number + index) % len(PACKINGS)]
            policy.config = make_config(
                hf_folder, LAYOUTS[layout], algorithm=case.algorithm, train={"tokens_per_microbatch": budget}
            )
            samples = samples_of(case, reverse)
            (batch,) = perturbed_old_logprobs(policy, pack(policy, samples), samples, case.scale)
            for chunk in policy.chunks:
                chunk.zero_grad_buffer()
            step.accumulate_gradients(policy.network, batch, policy.config.algorithm.at(1), 48)
            results[layout, name] = main_gradients(policy) if policy.parallel.dp_rank == 0 else {}
        leave_model_parallel()
    return results


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def expected(hf_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Each case by HF transformers in one process, one sequence at a time."""
    return {
        name: Reference(make_config(hf_folder, algorithm=case.algorithm)).gradient(samples_of(case), case.scale)
        for name, case in CASES.items()
    }


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, ["single"]),
        (2, ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2", "cp2"]),
        (4, ["tp2_pp2_sp_vpp2", "tp2_dp2", "dp4", "cp4", "tp2_cp2_sp", "cp2_dp2"]),
    ],
)
def test_every_objective_in_every_layout(
    hf_folder: Path, expected: dict[str, dict[str, torch.Tensor]], world_size: int, layouts: list[str]
) -> None:
    ranks = run_ranks(world_size, differentiate, hf_folder, layouts)
    architecture = Architecture.from_hf(hf_folder)
    for layout in layouts:
        for name in CASES:
            gradient = hf_gradients(architecture, [rank[layout, name] for rank in ranks])
            assert_same_gradient(gradient, expected[name], (layout, name))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cases_leave_the_clip_range_and_keep_off_its_bounds(hf_folder: Path, case: Case) -> None:
    """Rounding may not decide a branch: 1e-4 from the bounds, 1e-5 for gspo."""
    loss = make_config(hf_folder, algorithm=case.algorithm).algorithm.at(1)
    log_ratios = [-perturbation(sample, case.scale).double() for sample in samples_of(case)]
    if loss.objective == "gspo":
        log_ratios = [values.mean()[None] for values in log_ratios]
    ratios = torch.cat(log_ratios).exp()
    assert (ratios < 1 - loss.clip_low).any()
    assert (ratios > 1 + loss.clip_high).any()
    bounds = [1 - loss.clip_low, 1 + loss.clip_high, *([loss.dual_clip] if loss.dual_clip is not None else [])]
    nearest = torch.stack([(ratios - bound).abs().min() for bound in bounds]).min()
    assert nearest >= (1e-5 if loss.objective == "gspo" else 1e-4)


def test_the_importance_weights_keep_off_their_bounds(hf_folder: Path) -> None:
    case = CASES["ce_gppo"]
    config = make_config(hf_folder, algorithm=case.algorithm)
    reference = Reference(config)
    weights = []
    for sample in samples_of(case):
        old = reference.logprobs(sample)[0].detach() + perturbation(sample, case.scale)
        weights.append((old - torch.from_numpy(sample.rollout_logprobs)).double().exp())
    ratio = torch.cat(weights)
    cap = config.algorithm.importance_cap
    assert 0.2 < ((ratio > 1 / cap) & (ratio < cap)).double().mean() < 0.8
    assert min((ratio - cap).abs().min(), (ratio - 1 / cap).abs().min()) > 1e-4
