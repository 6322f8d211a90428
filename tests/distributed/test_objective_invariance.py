"""The gradient of the model under every objective is one process's, however the model, the batch and the sequences are cut.

Each objective appears with other aggregations and options, so that all of these are covered. Layouts of one world size
share their processes; tests/distributed/test_policy_parity.py compares the same layouts over models and micro-batches.
"""

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

# (settings, scale of the perturbed log-ratios)
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "ce_gppo": ({"preset": "paper", "kl_coef": 0.1, "importance_correction": "masked"}, 1.0),
    "ce_gppo, group_token_mean": (
        {"preset": "released-code", "dual_clip": 1.5, "aggregation": "group_token_mean"},
        1.0,
    ),
    "ppo_clip": ({"preset": "grpo", "entropy_coef": 0.01}, 1.0),
    "dapo": ({"preset": "dapo", "kl_coef": 0.1, "kl_estimator": "k2"}, 1.0),
    "cispo": (
        {"preset": "cispo", "aggregation": "seq_mean_token_sum_norm", "importance_correction": "truncated"},
        1.0,
    ),
    "gspo": ({"preset": "gspo"}, 0.0033),
    "gspo, token_mean": (
        {"preset": "gspo", "aggregation": "token_mean", "importance_correction": "truncated", "nll_coef": 0.1},
        0.0033,
    ),
}
# Token budget, and whether the samples come in reverse. 96 tokens hold two or three samples, 512 most of them.
PACKINGS = [(96, False), (512, True)]


def ordered_samples(reverse: bool) -> list[Sample]:
    samples = make_samples(4, 4, VOCAB_SIZE)
    return samples[::-1] if reverse else samples


def differentiate(rank: int, hf_folder: Path, layouts: list[str]) -> dict[tuple[str, str], Any]:
    """Gradient of one update by layout and case: runs on each rank. Layouts and cases take turns with the packings."""
    results = {}
    for number, layout in enumerate(layouts):
        config = make_config(hf_folder, LAYOUTS[layout], optimizer={"distributed": False})
        policy = build_policy(config)
        for index, (case, (settings, scale)) in enumerate(CASES.items()):
            budget, reverse = PACKINGS[(number + index) % len(PACKINGS)]
            policy.config = make_config(
                hf_folder, LAYOUTS[layout], algorithm=settings, train={"tokens_per_microbatch": budget}
            )
            samples = ordered_samples(reverse)
            (batch,) = perturbed_old_logprobs(policy, pack(policy, samples), samples, scale)
            for chunk in policy.chunks:
                chunk.zero_grad_buffer()
            step.accumulate_gradients(policy.network, batch, policy.config.algorithm.at(1), 48)
            results[layout, case] = main_gradients(policy) if policy.parallel.dp_rank == 0 else {}
        leave_model_parallel()
    return results


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def expected(hf_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Each case by HF transformers in one process, one sequence at a time."""
    return {
        case: Reference(make_config(hf_folder, algorithm=settings)).gradient(ordered_samples(False), scale)
        for case, (settings, scale) in CASES.items()
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
        for case in CASES:
            gradient = hf_gradients(architecture, [rank[layout, case] for rank in ranks])
            assert_same_gradient(gradient, expected[case], (layout, case))


@pytest.mark.parametrize("case", CASES)
def test_the_cases_leave_the_clip_range_and_keep_off_its_bounds(hf_folder: Path, case: str) -> None:
    """Rounding may not decide a branch: 1e-4 from the bounds, 1e-5 for gspo."""
    settings, scale = CASES[case]
    loss = make_config(hf_folder, algorithm=settings).algorithm.at(1)
    log_ratios = [-perturbation(sample, scale).double() for sample in ordered_samples(False)]
    if loss.objective == "gspo":
        log_ratios = [values.mean()[None] for values in log_ratios]
    ratios = torch.cat(log_ratios).exp()
    assert (ratios < 1 - loss.clip_low).any()
    assert (ratios > 1 + loss.clip_high).any()
    bounds = [1 - loss.clip_low, 1 + loss.clip_high, *([loss.dual_clip] if loss.dual_clip is not None else [])]
    nearest = torch.stack([(ratios - bound).abs().min() for bound in bounds]).min()
    assert nearest >= (1e-5 if loss.objective == "gspo" else 1e-4)


def test_the_importance_weights_keep_off_their_bounds(hf_folder: Path) -> None:
    settings, scale = CASES["ce_gppo"]
    config = make_config(hf_folder, algorithm=settings)
    reference = Reference(config)
    weights = []
    for sample in ordered_samples(False):
        old = reference.logprobs(sample)[0].detach() + perturbation(sample, scale)
        weights.append((old - torch.from_numpy(sample.rollout_logprobs)).double().exp())
    ratio = torch.cat(weights)
    cap = config.algorithm.importance_cap
    assert 0.2 < ((ratio > 1 / cap) & (ratio < cap)).double().mean() < 0.8
    assert min((ratio - cap).abs().min(), (ratio - 1 / cap).abs().min()) > 1e-4
