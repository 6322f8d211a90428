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
    canonical_name,
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    copy_hf_assets,
    parameters,
)
from megatron_gppo.parallel import ParallelState
from tests.support.distributed import run_ranks
from tests.support.tiny import make_tiny_model

LAYOUTS: dict[int, list[dict[str, int]]] = {  # by number of ranks, which take turns: starting them is what takes time
    1: [{"tp": 1}],
    2: [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}],
    4: [{"tp": 4}, {"tp": 2, "pp": 2}],  # tp 4: more ranks than KV heads
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2_tied": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM"},
    "qwen3_tied": {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True},
}
INPUT_IDS = torch.arange(24) * 7 % 65  # [T]
METADATA = {"non_homogeneous_layers": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with, for each of MODELS, NAME/hf and NAME/megatron."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        make_tiny_model(folder / name / "hf", **model)
        convert_hf_to_megatron(folder / name / "hf", folder / name / "megatron")
    return folder


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_a_live_model_gives_hf_logits_and_returns_every_byte(models: Path, world_size: int, tmp_path: Path) -> None:
    by_rank = run_ranks(world_size, run_layouts, models, tmp_path)
    for i, layout in enumerate(LAYOUTS[world_size]):
        for name in MODELS:
            case = f"{name} at {layout}"
            original = load_file(models / name / "hf" / "model.safetensors")
            results = [result[i][name] for result in by_rank]

            reference = transformers.AutoModelForCausalLM.from_pretrained(models / name / "hf")
            with torch.no_grad():
                expected = reference(INPUT_IDS[None]).logits[0]
            logits = [result["logits"] for result in results if result["logits"] is not None]
            assert len(logits) == layout.get("tp", 1), case  # every rank of the last stage
            for ours in logits:
                assert (ours - expected).abs().max() < 5e-6, case

            exported = [item for result in results for item in result["exported"]]
            assert len(dict(exported)) == len(exported), case
            assert_same(dict(exported), original, case)

            hf_path = tmp_path / str(i) / f"{name}_hf"
            convert_megatron_to_hf(tmp_path / str(i) / name, hf_path)
            assert_same(load_file(hf_path / "model.safetensors"), original, case)


def assert_same(ours: dict[str, torch.Tensor], original: dict[str, torch.Tensor], case: str) -> None:
    assert ours.keys() == original.keys(), case
    assert [name for name in original if not torch.equal(ours[name], original[name])] == [], case


def run_layouts(rank: int, models: Path, output: Path) -> list[dict[str, dict[str, Any]]]:
    """For each layout and model: logits, exported tensors."""
    from megatron.core import parallel_state

    results = []
    for i, layout in enumerate(LAYOUTS[dist.get_world_size()]):
        results.append(load_run_save(rank, models, output / str(i), layout))
        parallel_state.destroy_model_parallel()
    return results


def load_run_save(rank: int, models: Path, output: Path, layout: dict[str, int]) -> dict[str, dict[str, Any]]:
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
    for name in MODELS:
        architecture = Architecture.from_hf(models / name / "hf")
        chunks = build_chunks(architecture, config, parallel)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))  # what loading leaves out will show
        loaded = dist_checkpointing.load(sharded_state(chunks), str(models / name / "megatron"))
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])

        if rank == 0:
            copy_hf_assets(models / name / "hf", output / name / "hf")
        dist.barrier()
        dist_checkpointing.save(sharded_state(chunks), str(output / name), content_metadata=METADATA)
        results[name] = {
            "logits": run(chunks, architecture, parallel),
            "exported": export(chunks, architecture, parallel),
        }
    return results


def sharded_state(chunks: list[Any]) -> dict[str, Any]:
    """Without the _extra_state of FP8 layers, which a converted checkpoint cannot have."""
    states = [chunk.sharded_state_dict(metadata=METADATA) for chunk in chunks]
    return {
        f"model{i}": {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}
        for i, state in enumerate(states)
    }


@torch.no_grad()
def run(chunks: list[Any], architecture: Architecture, parallel: ParallelState) -> torch.Tensor | None:
    """Logits [T, V] on the last stage. The chunks run one after the other, in the order of their layers."""
    from megatron.core.packed_seq_params import PackedSeqParams

    length = len(INPUT_IDS)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=length, max_seqlen_kv=length
    )
    hidden = torch.empty(length, 1, architecture.hidden_size)
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
    own = hidden.squeeze(1) @ chunks[-1].head_weight.T  # [T, V/TP]
    return torch.cat(gather(own, parallel), dim=1)[:, : architecture.vocab_size]


def export(chunks: list[Any], architecture: Architecture, parallel: ParallelState) -> list[tuple[str, torch.Tensor]]:
    """The HF tensors of this stage, on TP rank 0."""
    table = {parameter.name: parameter for parameter in parameters(architecture)}
    exported = []
    for chunk in chunks:
        offset = chunk.decoder.layers[0].layer_number - 1
        for live_name, tensor in chunk.named_parameters():
            if getattr(tensor, "shared", False):  # the last stage's copy of a tied embedding
                continue
            parameter = table[canonical_name(architecture, live_name, offset)]
            full = parameter.join(gather(tensor.detach(), parallel))
            if parallel.tp_rank == 0:
                exported += [(name, hf.clone()) for name, hf in parameter.to_hf(full)]
    return exported


def gather(tensor: torch.Tensor, parallel: ParallelState) -> list[torch.Tensor]:
    shards = [torch.empty_like(tensor) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, tensor.contiguous(), group=parallel.tp_group)
    return shards
