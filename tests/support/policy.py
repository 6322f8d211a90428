"""A real Megatron policy over gloo ranks, filled from an HF folder, for tests; and its single-process HF reference."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_gppo.algorithm import loss_denominator, policy_loss
from megatron_gppo.config import Config, parse_config
from megatron_gppo.convert import Architecture, HfCheckpoint, parameters
from megatron_gppo.convert.stacked_experts import unstack
from megatron_gppo.datatypes import Sample, ScoredBatch, UpdateBatch
from megatron_gppo.packing import pack_updates
from megatron_gppo.policy import Policy, initialize_model_parallel

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "dp2": {},
    "tp4_sp": {"tp": 4, "sequence_parallel": True},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_sp_vpp2": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
    "tp2_dp2": {"tp": 2},
    "pp2_dp2": {"pp": 2},
    "dp4": {},
    "ep2": {"ep": 2},  # over data-parallel ranks
    "tp2_sp_ep2": {"tp": 2, "sequence_parallel": True, "ep": 2},  # over tensor-parallel ranks
    "tp2_sp_ep4": {"tp": 2, "sequence_parallel": True, "ep": 4},  # over both
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2_ep2": {"pp": 2, "ep": 2},
    "dp4_ep2": {"ep": 2},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "tp2_cp2": {"tp": 2, "cp": 2},
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2_cp2": {"pp": 2, "cp": 2},
    "pp2_vpp2_cp2": {"pp": 2, "vpp": 2, "cp": 2},
    "cp2_dp2": {"cp": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
}


def make_config(hf_folder: Path, layout: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A configuration for tests; `sections` are merged over small defaults."""
    tree: dict[str, Any] = {
        "model": {"hf_path": str(hf_folder), "dtype": "fp32"},
        "run": {"dir": "unused", "collective_timeout_s": 120},
        "parallel": layout or {},
        "data": {"max_prompt_tokens": 32},
        "rollout": {
            "mode": "replay",
            "replay": "unused",
            "temperature": 0.8,
            "prompts_per_step": 8,
            "responses_per_prompt": 4,
            "max_response_tokens": 48,
        },
        "train": {"steps": 4, "prompts_per_update": 4, "tokens_per_microbatch": 128},
        "algorithm": {"preset": "paper"},
        "optimizer": {"lr": 1e-3, "warmup_updates": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree)


def build_policy(config: Config) -> Policy:
    """A policy on the default process group, filled through the conversion table without a checkpoint on disk."""
    architecture = Architecture.from_hf(config.model.hf_path)
    policy = Policy(config, architecture, initialize_model_parallel(config))
    weights = HfCheckpoint(config.model.hf_path)
    table = {parameter.name: parameter for parameter in parameters(architecture)}
    for name, live in policy.named_parameters():
        full = table[name].from_hf({hf_name: weights.read(hf_name) for hf_name in table[name].hf_names})
        live.data.copy_(table[name].shard(full, policy.parallel.tp_rank, policy.parallel.tp_size))
    policy.optimizer.reload_model_params()
    return policy


def leave_model_parallel() -> None:
    """So that the same processes can form another layout.

    Megatron forgets its groups without ending them, and gloo has threads for each, which wake up all the time: after some
    layouts, the machine is busy with nothing else. Of the groups in the caller's policy, that comes with the next call.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def make_samples(num_groups: int, group_size: int, vocab_size: int, seed: int = 0) -> list[Sample]:
    """Random samples of 1 to 47 response tokens, whose advantages differ in sign.

    Without token 0: it is the padding token, to whose embedding HF gives no gradient.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for group in range(num_groups):
        prompt = generator.integers(1, vocab_size, generator.integers(1, 32))
        for _ in range(group_size):
            response = generator.integers(1, vocab_size, generator.integers(1, 48))
            samples.append(
                Sample(
                    group=group,
                    prompt_ids=prompt,
                    response_ids=response,
                    rollout_logprobs=generator.normal(-3, 1, len(response)).astype(np.float32),
                    advantage=float(generator.normal()),
                    correct=bool(generator.integers(0, 2)),
                    masked=False,
                )
            )
    return samples


def pack(policy: Policy, samples: list[Sample]) -> list[UpdateBatch]:
    config = policy.config
    return pack_updates(
        samples,
        groups_per_update=config.train.prompts_per_update,
        dp_rank=policy.parallel.dp_rank,
        dp_size=policy.parallel.dp_size,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        alignment=policy.alignment,
        sequence_alignment=policy.sequence_alignment,
        microbatches_multiple_of=policy.microbatches_multiple_of,
    )


def perturbed_old_logprobs(
    policy: Policy, updates: list[UpdateBatch], samples: list[Sample], scale: float = 1.0
) -> list[ScoredBatch]:
    """Old log-probs that put ratios on both sides of the clip range and at least 1e-4 away from its bounds, and log-probs
    of a reference policy that are about as far away.

    The perturbation belongs to the sample, so it is the same however the samples are packed.
    """
    return [
        ScoredBatch(
            batch.update,
            _perturbed(batch, samples, lambda sample: perturbation(sample, scale)),
            _perturbed(batch, samples, reference_perturbation),
        )
        for batch in policy.add_old_logprobs(updates)
    ]


def _perturbed(
    batch: ScoredBatch, samples: list[Sample], of_sample: Callable[[Sample], torch.Tensor]
) -> list[torch.Tensor]:
    perturbed = []
    for packed, logprobs in zip(batch.update.microbatches, batch.old_logprobs, strict=True):
        values = logprobs.clone()
        if packed.sample_indices:
            values[packed.loss_mask] += torch.cat([of_sample(samples[index]) for index in packed.sample_indices])
        perturbed.append(values)
    return perturbed


def perturbation(sample: Sample, scale: float = 1.0) -> torch.Tensor:
    """[L], old log-probs minus the policy's."""
    # Their negatives are the log-ratios; at scale 1 the bounds are at -0.223 and 0.182, dapo's at 0.247.
    choices = scale * torch.tensor([-0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6])
    return choices[torch.randint(0, len(choices), (len(sample.response_ids),), generator=_generator(sample))]


def reference_perturbation(sample: Sample) -> torch.Tensor:
    """[L], log-probs of the reference policy minus the policy's."""
    return 0.2 * torch.randn(len(sample.response_ids), generator=_generator(sample))


def _generator(sample: Sample) -> torch.Generator:
    return torch.Generator().manual_seed(int(sample.response_ids.sum()))


def main_gradients(policy: Policy) -> dict[str, tuple[int, torch.Tensor]]:
    """This rank's accumulated gradients by canonical name, each with the rank's place in its tensor-parallel group."""
    return {
        name: (policy.parallel.tp_rank, parameter.main_grad.clone())
        for name, parameter in policy.named_parameters()
        if not getattr(parameter, "shared", False)
    }


def hf_gradients(
    architecture: Architecture, by_rank: list[dict[str, tuple[int, torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """Full gradients by HF name, from each rank's {canonical name: (tp_rank, main gradient)}."""
    gradients = {}
    for parameter in parameters(architecture):
        shards = dict(rank[parameter.name] for rank in by_rank if parameter.name in rank)
        full = parameter.join([shards[tp_rank] for tp_rank in sorted(shards)])
        gradients.update(parameter.to_hf(full))
    return gradients


def assert_same_gradient(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: Any) -> None:
    """At most 5e-6 over all parameters and 2e-5 for any one tensor, relative in norm."""
    assert actual.keys() == expected.keys()
    difference = {name: (actual[name] - expected[name]).double().norm() for name in expected}
    size = {name: expected[name].double().norm() for name in expected}
    total = torch.stack(list(difference.values())).norm() / torch.stack(list(size.values())).norm()
    assert total < 5e-6, f"{case}: relative difference {total:.2e} over all parameters"
    for name in expected:
        assert difference[name] < 2e-5 * size[name], f"{case}, {name}: {difference[name] / size[name]:.2e}"


class Reference:
    """The same computation by HF transformers in one process, one sequence at a time, without packing."""

    def __init__(self, config: Config):
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(config.model.hf_path, dtype=torch.float32)

    def logprobs(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response and entropy at its positions: [L], [L]."""
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]))
        logits = self.model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1].float()
        scaled = (logits / self.config.rollout.temperature).log_softmax(-1)
        entropy = -(scaled.exp() * scaled).sum(-1)
        return scaled.gather(1, torch.from_numpy(sample.response_ids)[:, None])[:, 0], entropy

    def gradient(self, samples: list[Sample], scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Gradient of one update's loss by HF name, with the perturbed log-probs of the Megatron side."""
        self.model.zero_grad()
        update = UpdateBatch(
            microbatches=[],
            num_loss_tokens=sum(len(sample.response_ids) for sample in samples),
            num_loss_sequences=len(samples),
            num_loss_groups=len({sample.group for sample in samples}),
            num_correct_tokens=sum(len(sample.response_ids) for sample in samples if sample.correct),
        )
        loss = self.config.algorithm.at(1)
        denominator = loss_denominator(loss, update, max_response_tokens=self.config.rollout.max_response_tokens)
        for sample in samples:
            logprobs, entropy = self.logprobs(sample)
            length = len(logprobs)
            group_length = sum(len(other.response_ids) for other in samples if other.group == sample.group)
            output = policy_loss(
                loss,
                logprobs=logprobs,
                old_logprobs=logprobs.detach() + perturbation(sample, scale),
                advantages=torch.full((length,), sample.advantage),
                loss_mask=torch.ones(length, dtype=torch.bool),
                denominator=denominator,
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                sequence_lengths=torch.tensor([length]),
                group_lengths=torch.tensor([group_length]),
                entropy=entropy,
                ref_logprobs=logprobs.detach() + reference_perturbation(sample),
                rollout_logprobs=torch.from_numpy(sample.rollout_logprobs),
                correct=torch.tensor([sample.correct]),
                num_correct_tokens=update.num_correct_tokens,
            )
            output.loss.backward()
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            experts = unstack(name, tuple(parameter.shape))
            parts = parameter.grad.flatten().split(
                [torch.Size(shape).numel() for _, shape in experts] or parameter.numel()
            )
            named = experts or [(name, tuple(parameter.shape))]
            gradients |= {part: flat.view(shape) for (part, shape), flat in zip(named, parts, strict=True)}
        return gradients
