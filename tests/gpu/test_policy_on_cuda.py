"""The policy on one GPU: the paths that only CUDA takes, against the same reference as on the CPU.

Needs torch, megatron-core and transformers; neither a network, nor TransformerEngine, nor SGLang.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_gppo.algorithm import linear_logprobs_and_entropy, values_in_force
from megatron_gppo.packing import unpack
from megatron_gppo.policy import Policy, Progress, checkpoint, initialize_model_parallel, shut_down, step
from megatron_gppo.policy.context_parallel import token_positions
from megatron_gppo.policy.local_modules import PackedAttention
from tests.support.logprob_reference import of_logits
from tests.support.policy import (
    Reference,
    build_policy,
    hf_gradients,
    main_gradients,
    make_config,
    make_samples,
    pack,
    perturbed_old_logprobs,
)
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    shut_down()


def build(folder: Path, **sections: Any) -> Policy:
    return build_policy(make_config(folder, optimizer={"distributed": False}, **sections))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_fp32_equals_hf(process_group: None, tmp_path: Path, architecture: str) -> None:
    """Log-probs and gradient, with full-precision matmuls."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    folder = make_tiny_model(tmp_path / "model", architecture)
    policy = build(folder)
    samples = make_samples(4, 4, policy.architecture.vocab_size)
    updates = pack(policy, samples)
    (scored,) = policy.add_old_logprobs(updates)
    reference = Reference(policy.config)
    for index, values in unpack(scored.old_logprobs, scored.update.microbatches).items():
        expected = reference.logprobs(samples[index])[0].detach()
        torch.testing.assert_close(torch.from_numpy(values), expected, rtol=0, atol=2e-5)

    (batch,) = perturbed_old_logprobs(policy, updates, samples)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    step.accumulate_gradients(policy.network, batch, policy.config.algorithm.at(1), 48)
    gradient = hf_gradients(policy.architecture, [main_gradients(policy)])
    for name, expected in reference.gradient(samples).items():
        difference = (gradient[name].cpu() - expected).norm() / expected.norm()
        assert difference < 2e-5, f"{name}: {difference:.2e}"


def test_bf16_trains_and_resumes(process_group: None, tmp_path: Path) -> None:
    """Flash attention over packed sequences, fp32 masters, recompute; a resumed update is the one that would have followed."""
    folder = make_tiny_model(tmp_path / "model")
    sections: dict[str, Any] = {
        "model": {"dtype": "bf16"},
        "train": {"recompute": "full"},
        "optimizer": {"lr": 1e-3, "warmup_updates": 0},
    }
    policy = build_policy(make_config(folder, **sections))
    before = {name: shard.clone() for name, shard in policy.shards().items()}
    samples = make_samples(8, 4, policy.architecture.vocab_size)
    batches = policy.add_old_logprobs(pack(policy, samples))
    *in_force, after = values_in_force(policy.config, step=1, updates=range(len(batches) + 1), control=None)
    stats = [policy.update(batch, values) for batch, values in zip(batches, in_force, strict=True)]
    assert all(np.isfinite(one.loss) and one.grad_norm > 0 and not one.skipped for one in stats)
    # Scoring and training run the same kernels on the same micro-batches.
    assert stats[0].maxima["abs_ratio_minus_one"] < 1e-2
    assert any(not torch.equal(before[name], shard) for name, shard in policy.shards().items())

    progress = Progress(step=1, updates=len(stats), data_position=8)
    checkpoint.save(tmp_path / checkpoint.folder_name(1), policy, progress, folder)
    more = policy.add_old_logprobs(pack(policy, make_samples(4, 4, policy.architecture.vocab_size, seed=1)))
    policy.update(more[0], after)
    uninterrupted = {name: shard.clone() for name, shard in policy.shards().items()}
    resumed = Policy(policy.config, policy.architecture, policy.parallel)
    assert checkpoint.load(tmp_path / checkpoint.folder_name(1), resumed) == progress
    again = resumed.add_old_logprobs(pack(resumed, make_samples(4, 4, policy.architecture.vocab_size, seed=1)))
    resumed.update(again[0], after)
    for name, shard in resumed.shards().items():
        torch.testing.assert_close(shard, uninterrupted[name], msg=name)


def test_packed_flash_attention_equals_sdpa(process_group: None, tmp_path: Path) -> None:
    policy = build(make_tiny_model(tmp_path / "model"), model={"dtype": "bf16"})
    attention = PackedAttention(policy.models[0].config)
    lengths = [5, 1, 300, 17]
    packed = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    parameters = type("Packed", (), {})()
    parameters.cu_seqlens_q = parameters.cu_seqlens_kv = packed
    parameters.max_seqlen_q = parameters.max_seqlen_kv = max(lengths)
    flash = attention(query, key, value, None, packed_seq_params=parameters)
    exact = attention(query.float(), key.float(), value.float(), None, packed_seq_params=parameters)
    torch.testing.assert_close(flash.float(), exact, rtol=0, atol=2e-2)
    weight = torch.randn_like(exact)
    got = torch.autograd.grad((flash.float() * weight).sum(), (query, key, value))
    want = torch.autograd.grad((exact * weight).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 2e-2


@pytest.mark.parametrize("size", [2, 3])
def test_flash_attention_over_context_parallel_parts_equals_the_whole(
    process_group: None, tmp_path: Path, size: int
) -> None:
    """One rank after the other on the same GPU; what their communication adds is tested over gloo."""
    policy = build(make_tiny_model(tmp_path / "model"), model={"dtype": "bf16"})
    attention = PackedAttention(policy.models[0].config)
    lengths = [2 * size * chunk for chunk in (1, 100, 7)]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    whole = attention.attend(query, key, value, packed)
    own = [token_positions(bounds, rank, size) for rank in range(size)]
    parts = [attention.attend(query[own[rank]], key, value, packed, rank, size) for rank in range(size)]
    torch.testing.assert_close(torch.cat(parts), whole[torch.cat(own)], rtol=0, atol=2e-2)
    weight = torch.randn_like(whole)
    want = torch.autograd.grad((whole * weight).sum(), (query, key, value))
    got = torch.autograd.grad((torch.cat(parts) * weight[torch.cat(own)]).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_equal_fp64(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.manual_seed(0)
    hidden = torch.randn(301, 96, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(5003, 96, device="cuda", dtype=dtype) * 0.3).requires_grad_()
    targets = torch.randint(0, 5003, (301,), device="cuda")
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden, weight, targets, temperature=0.7, entropy_requires_grad=True
    )
    assert entropy is not None
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact, exact_entropy = of_logits(exact_hidden @ exact_weight.t() / 0.7, targets)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-5  # bf16 inputs are exact; accumulation is in fp32
    assert (logprobs - exact).norm() / exact.norm() < tolerance
    assert (entropy - exact_entropy).norm() / exact_entropy.norm() < tolerance
    (logprobs.sum() + entropy.sum()).backward()
    (exact.sum() + exact_entropy.sum()).backward()
    bound = 5e-6 if dtype == torch.float32 else 1e-2  # the gradients themselves are bf16
    for got, want in ((hidden, exact_hidden), (weight, exact_weight)):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad.double() - want.grad).norm() / want.grad.norm() < bound


def test_groups_are_nccl(process_group: None, tmp_path: Path) -> None:
    config = make_config(make_tiny_model(tmp_path / "model"))
    parallel = initialize_model_parallel(config)
    assert dist.get_backend(parallel.tp_group) == "nccl"
    assert dist.get_backend(parallel.control_group) == "gloo"
