"""Converted checkpoints in live Megatron models: loaded at any layout, exported from memory, and saved by Megatron."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

from megatron_gppo.config import parse_config
from megatron_gppo.convert import (
    Architecture,
    HfCheckpoint,
    canonical_name,
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    keep_hf_assets,
    parameters,
)
from megatron_gppo.convert.memory import same_bits
from megatron_gppo.parallel import ParallelState
from megatron_gppo.weight_sync.export import Exporter
from tests.support.distributed import run_ranks
from tests.support.policy import leave_model_parallel
from tests.support.tiny import make_tiny_model

LAYOUTS: dict[int, list[dict[str, Any]]] = {  # by number of ranks, which take turns: starting them is what takes time
    1: [{"tp": 1}],
    2: [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}],
    4: [{"tp": 4}, {"tp": 2, "pp": 2}],  # tp 4: more ranks than KV heads
}
EXPERT_LAYOUTS: dict[int, list[dict[str, Any]]] = {  # experts with tensor parallelism ask for sequence parallelism
    1: [{}],
    2: [{"ep": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}],
    4: [
        {"tp": 4, "sequence_parallel": True, "ep": 2},
        {"tp": 2, "pp": 2, "sequence_parallel": True},
        {"tp": 2, "pp": 2, "sequence_parallel": True, "ep": 2},
    ],
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2_tied": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM"},
    "qwen3_tied": {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True},
}
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"architecture": "Qwen3MoeForCausalLM"},
    "qwen3_moe_not_normalized": {
        "architecture": "Qwen3MoeForCausalLM",
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "stacked_experts": True,
    },
}
INPUT_IDS = torch.arange(24) * 7 % 65  # [T]
METADATA = {"non_homogeneous_layers": True}  # pass copies: Megatron adds the current groups


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with, for each of MODELS, NAME/hf and NAME/megatron."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (MODELS | EXPERT_MODELS).items():
        make_tiny_model(folder / name / "hf", **model)
        convert_hf_to_megatron(folder / name / "hf", folder / name / "megatron")
    return folder


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_a_live_model_gives_hf_logits_and_returns_every_byte(models: Path, world_size: int, tmp_path: Path) -> None:
    check(models, tmp_path, world_size, list(MODELS), LAYOUTS[world_size])


@pytest.mark.parametrize("world_size", EXPERT_LAYOUTS)
def test_live_experts_give_hf_logits_and_return_every_byte(models: Path, world_size: int, tmp_path: Path) -> None:
    check(models, tmp_path, world_size, list(EXPERT_MODELS), EXPERT_LAYOUTS[world_size])


def check(models: Path, tmp_path: Path, world_size: int, names: list[str], layouts: list[dict[str, Any]]) -> None:
    by_rank = run_ranks(world_size, run_layouts, models, tmp_path, names, layouts)
    for i, layout in enumerate(layouts):
        for name in names:
            case = f"{name} at {layout}"
            original = load_file(models / name / "hf" / "model.safetensors")
            results = [result[i][name] for result in by_rank]

            reference = transformers.AutoModelForCausalLM.from_pretrained(models / name / "hf")
            with torch.no_grad():
                expected = reference(INPUT_IDS[None]).logits[0]
            logits = [result["logits"] for result in results if result["logits"] is not None]
            assert len(logits) == world_size // layout.get("pp", 1), case  # every rank of the last stage
            for ours in logits:
                assert (ours - expected).abs().max() < 5e-6, case

            hf_path = tmp_path / str(i) / f"{name}_hf"
            convert_megatron_to_hf(tmp_path / str(i) / name, hf_path)
            assert_same(load_file(hf_path / "model.safetensors"), original, case)
            separate = HfCheckpoint(hf_path)
            assert_same(results[0]["exported"], {name: separate.read(name) for name in separate.tensors}, case)


def assert_same(ours: dict[str, torch.Tensor], original: dict[str, torch.Tensor], case: str) -> None:
    assert ours.keys() == original.keys(), case
    assert [name for name in original if not same_bits(ours[name], original[name])] == [], case


def run_layouts(
    rank: int, models: Path, output: Path, names: list[str], layouts: list[dict[str, Any]]
) -> list[dict[str, dict[str, Any]]]:
    """For each layout and model: logits, exported tensors."""
    results = []
    for i, layout in enumerate(layouts):
        results.append(load_run_save(rank, models, output / str(i), names, layout))
        leave_model_parallel()
    return results


def load_run_save(
    rank: int, models: Path, output: Path, names: list[str], layout: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    from megatron.core import dist_checkpointing

    from megatron_gppo.policy.model import build_chunks
    from megatron_gppo.policy.setup import initialize_model_parallel

    config = parse_config(
        {
            "model": {"hf_path": str(models), "dtype": "fp32"},
            "run": {"dir": str(output)},
            "parallel": layout,
            "data": {"train": "none.jsonl"},
            "algorithm": {"preset": "paper"},
        }
    )
    parallel = initialize_model_parallel(config)
    results = {}
    for name in names:
        architecture = Architecture.from_hf(models / name / "hf")
        chunks = build_chunks(architecture, config, parallel)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))  # what loading leaves out will show
        loaded = dist_checkpointing.load(sharded_state(chunks), str(models / name / "megatron"))
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
            chunk.eval()

        if rank == 0:
            keep_hf_assets(models / name / "hf", output / name / "hf")
        dist.barrier()
        dist_checkpointing.save(sharded_state(chunks), str(output / name), content_metadata=dict(METADATA))
        results[name] = {
            "logits": run(chunks, architecture, parallel),
            "exported": export(chunks, architecture, parallel),
        }
    return results


def sharded_state(chunks: list[Any]) -> dict[str, Any]:
    """Without the _extra_state of FP8 layers, which a converted checkpoint cannot have."""
    states = [chunk.sharded_state_dict(metadata=dict(METADATA)) for chunk in chunks]
    return {
        f"model{i}": {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}
        for i, state in enumerate(states)
    }


@torch.no_grad()
def run(chunks: list[Any], architecture: Architecture, parallel: ParallelState) -> torch.Tensor | None:
    """Logits [T, V] on the last stage. The chunks run one after the other, in the order of their layers."""
    from megatron.core.packed_seq_params import PackedSeqParams

    length = len(INPUT_IDS)
    cut = parallel.tp_size if chunks[0].config.sequence_parallel else 1
    bounds = torch.tensor([0, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=length, max_seqlen_kv=length
    )
    hidden = torch.empty(length // cut, 1, architecture.hidden_size)
    for chunk in chunks:
        for stage in range(parallel.pp_size):
            if stage == parallel.pp_rank:
                chunk.set_input_tensor(hidden)
                hidden = chunk(
                    input_ids=INPUT_IDS[None],
                    position_ids=torch.arange(length)[None],
                    attention_mask=None,
                    packed_seq_params=packed,
                )
            dist.broadcast(hidden, group=parallel.pp_group, group_src=stage)
    if not parallel.is_last_pp_stage:
        return None
    hidden = torch.cat(gather(hidden, parallel)[:cut] if cut > 1 else [hidden])
    own = hidden.squeeze(1) @ chunks[-1].head_weight.T  # [T, V/TP]
    return torch.cat(gather(own, parallel), dim=1)[:, : architecture.vocab_size]


def export(chunks: list[Any], architecture: Architecture, parallel: ParallelState) -> dict[str, torch.Tensor]:
    """The HF tensors that weight sync would send to the engines, on rank 0."""
    shards = {}
    expert_offset = architecture.num_experts // parallel.ep_size * parallel.ep_rank
    for chunk in chunks:
        offset = chunk.decoder.layers[0].layer_number - 1
        for live_name, tensor in chunk.named_parameters():
            if not getattr(tensor, "shared", False):  # the last stage's copy of a tied embedding
                shards[canonical_name(architecture, live_name, offset, expert_offset)] = tensor.detach()
    exporter = Exporter(parameters(architecture), shards, parallel, torch.float32, bucket_bytes=100_000)
    # Cloned while iterating: a bucket's memory is used again for the second one after it.
    return {
        name: tensor.clone()
        for bucket in exporter.export(shards)
        if bucket is not None
        for name, tensor in bucket.tensors().items()
    }


def gather(tensor: torch.Tensor, parallel: ParallelState) -> list[torch.Tensor]:
    shards = [torch.empty_like(tensor) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, tensor.contiguous(), group=parallel.tp_group)
    return shards
