"""Shards of a policy without a policy: HF tensors cut by convert's table as the ranks of a layout would hold them."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_gppo.convert import Architecture, Parameter, parameters
from megatron_gppo.convert.table import EMBEDDING, OUTPUT_LAYER
from megatron_gppo.parallel import ParallelState

SINGLE = ParallelState(0, 1, 0, 1, 0, 1, 0, 1, None, None, None, None)


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """What an engine should be given: every tensor once, so that a tied lm_head is not among them."""
    return load_file(folder / "model.safetensors")


def make_parallel_state(rank: int, *, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, ep: int = 1) -> ParallelState:
    """Groups over the default group's ranks: TP neighbours are next to each other, then CP, DP, PP. Collective.

    EP neighbours are next to each other, too, over a stage's ranks.
    """
    grid = torch.arange(tp * cp * dp * pp).view(pp, dp, cp, tp)
    axes = {"pp": 0, "dp": 1, "cp": 2, "tp": 3}
    rows = {name: grid.movedim(axis, -1).flatten(0, 2) for name, axis in axes.items()}
    rows["ep"] = grid.view(-1, ep)
    groups = {name: dist.new_subgroups_by_enumeration(ranks.tolist())[0] for name, ranks in rows.items()}
    pp_rank, dp_rank, cp_rank, tp_rank = (int(index) for index in (grid == rank).nonzero()[0])
    return ParallelState(
        rank=rank,
        world_size=grid.numel(),
        tp_rank=tp_rank,
        tp_size=tp,
        pp_rank=pp_rank,
        pp_size=pp,
        dp_rank=dp_rank,
        dp_size=dp,
        tp_group=groups["tp"],
        pp_group=groups["pp"],
        dp_group=groups["dp"],
        cp_rank=cp_rank,
        cp_size=cp,
        cp_group=groups["cp"],
        control_group=dist.group.WORLD,
        ep_rank=rank % ep,
        ep_size=ep,
        expert_dp_rank=rank % (tp * cp * dp) // ep,
        ep_group=groups["ep"],
    )


def cut(
    architecture: Architecture, hf: Mapping[str, Tensor], parallel: ParallelState, *, interleaved: bool = False
) -> dict[str, Tensor]:
    """What this rank would hold, by canonical name. Interleaved: layers are dealt to the stages in turn (two chunks a
    stage with two stages and four layers). A tied model's last stage holds a copy of the embedding, as in Megatron.
    """
    first, last = 0, parallel.pp_size - 1
    stages = {EMBEDDING: {first, last} if architecture.tied_embeddings else {first}, OUTPUT_LAYER: {last}}
    for layer in range(architecture.num_layers):
        owner = layer % parallel.pp_size if interleaved else layer * parallel.pp_size // architecture.num_layers
        stages[f"decoder.layers.{layer}"] = {owner}
    stages["decoder.final_layernorm.weight"] = {last}
    return {
        parameter.name: parameter.shard(parameter.from_hf(hf), parallel.tp_rank, parallel.tp_size).clone()
        for parameter in parameters(architecture)
        if parallel.pp_rank in stages[_stage_key(parameter.name)] and _has_expert(parameter, parallel)
    }


def _has_expert(parameter: Parameter, parallel: ParallelState) -> bool:
    return parameter.expert is None or parameter.expert * parallel.ep_size // parameter.num_experts == parallel.ep_rank


def _stage_key(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else name
