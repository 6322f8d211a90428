"""Memory of a rank, worked out from the configuration alone: what --dry-run prints, a row for each pipeline stage.

State of the policy, bytes a parameter: weights 2 (bf16) or 4 (fp32), gradients 4 (they are summed in fp32), optimizer 12 for
bf16 (fp32 master and Adam's two moments) or 8 for fp32; optimizer.distributed divides the last by the ranks that hold the same
parameter.

Activations, for micro-batches that fill train.tokens_per_microbatch. Letters: s tokens of one on a rank (1/cp of it), t = tp,
u = t under sequence parallelism and 1 without, h hidden size, q and k rows of the queries and of the keys (heads x
head_dim), d head_dim, f ffn_hidden_size, e that of an expert, r experts_per_token, E experts. A layer keeps for its
backward, in numbers a token (2 bytes each in bf16, 4 in fp32):

                                      TransformerEngine     local layers on a CPU
    inputs and outputs of two norms   4h/u                  6h/u           the normalised inputs, too
    linear_qkv's output               (q + 2k)/t            (q + 2k)/t     the values stay in it
    norms of queries and keys         (q + k)/t             (2q + k)/t     Qwen3 only
    rotary positions                  (q + k)/t             (q + k)/t + 4d
    attention's output                q/t                   2q/t           and 2k cp/t under cp: the row's keys and values
    MLP                               3f/t                  5f/t
    or experts, equally loaded        r (h + 3e)/u          r (h + 6e)/u
       and their router               8E/u                  8E/u

With recompute: full a layer keeps its input, h/u, and all of the above only while it is in its backward. On stage p (from
0) 1F1B has at most pp - p micro-batches under way, interleaving 2 (pp - p - 1) + (vpp - 1) pp + 1 chunks of 1/vpp of the
stage's layers; neither has more than the update has. All that is "activations".

"Working" is what there is beside it for a moment: the larger of

  - in a layer's backward: what was recomputed, and gradients of (3f/t + 2h/u) or r (3e + 2h)/u numbers a token;
  - in the output layer, on the last stage: the final norm's 2h/u numbers (3h/u locally), 14 bytes a token for each of a
    tile's 4096 columns (logits, their gradient, and scratch), and 10 h (hidden states gathered; their gradient, twice, in fp32).

Tests compare the local column with what autograd keeps in a real Megatron model. TransformerEngine's follows from what its
layers save, and was not measured; --dry-run prints it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture, parameters

TILE_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage when it is fullest."""

    parameters: int  # a number, not bytes
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept by all micro-batches under way
    working: int  # beside them, for a moment
    reference: int = 0  # in host memory, so not part of the total

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


class Activations(NamedTuple):
    """Bytes of activations on a rank of one pipeline stage."""

    kept: int  # by all micro-batches under way, from one step of the pipeline to the next
    recomputed: int  # by the layer in its backward, with recompute: full
    gradients: int  # within that layer
    final_norm: int  # kept by it on the last stage, until the output layer's backward is done
    output_layer: int  # its tile and gradients, on the last stage

    @property
    def saved(self) -> int:
        """The most that autograd holds."""
        return self.kept + max(self.recomputed, self.final_norm)

    @property
    def working(self) -> int:
        """The most that there is beside kept."""
        return max(self.recomputed + self.gradients, self.final_norm + self.output_layer)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on each of an engine's GPUs."""

    weights: int
    cache_per_token: int


def stage_memory(
    config: Config, architecture: Architecture, *, world_size: int, num_microbatches: int
) -> list[StageMemory]:
    """For each pipeline stage. num_microbatches: most that an update has on a rank."""
    layout, bf16 = config.parallel, config.model.dtype == "bf16"
    dense_replicas, expert_replicas = 1, 1
    if config.optimizer.distributed:
        dense_replicas = world_size // (layout.tp * layout.pp)
        expert_replicas = world_size // (layout.pp * layout.ep)
    stages = []
    for stage, (dense, experts) in enumerate(parameters_by_stage(architecture, config)):
        weights = (dense + experts) * (2 if bf16 else 4)
        sharded = -(-dense // dense_replicas) + -(-experts // expert_replicas)
        activations = activations_of_stage(config, architecture, stage, num_microbatches, fused=True)
        stages.append(
            StageMemory(
                parameters=dense + experts,
                weights=weights,
                gradients=(dense + experts) * 4,
                optimizer=sharded * (12 if bf16 else 8),
                activations=activations.kept,
                working=activations.working,
                reference=weights if config.algorithm.kl_coef > 0 else 0,
            )
        )
    return stages


def parameters_by_stage(architecture: Architecture, config: Config) -> list[tuple[int, int]]:
    """Parameters on one rank of each pipeline stage: (all but experts', experts').

    Interleaving changes which layers a stage has, not how many, and layers are alike.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    layers_per_stage = architecture.num_layers // pp
    dense, experts = [0] * pp, [0] * pp
    for parameter in parameters(architecture):
        size = parameter.shard(torch.empty(parameter.shape, device="meta"), 0, tp).numel()
        if parameter.name.startswith("decoder.layers."):
            stage = int(parameter.name.split(".")[2]) // layers_per_stage
            (dense if parameter.expert is None else experts)[stage] += size
        elif parameter.name.startswith("embedding."):
            dense[0] += size
            if architecture.tied_embeddings and pp > 1:
                dense[-1] += size  # a copy, as the output layer
        else:
            dense[-1] += size
    return [(count, of_experts // config.parallel.ep) for count, of_experts in zip(dense, experts, strict=True)]


def activations_of_stage(
    config: Config, architecture: Architecture, stage: int, num_microbatches: int, *, fused: bool
) -> Activations:
    """fused: as TransformerEngine keeps them; else as the local layers do on a CPU."""
    layout = config.parallel
    tokens = config.train.tokens_per_microbatch // layout.row_alignment * layout.row_alignment // layout.cp
    number = tokens * (2 if config.model.dtype == "bf16" else 4)  # bytes of one number for each token
    hidden = architecture.hidden_size / _sequence_shards(config)
    full = config.train.recompute == "full"
    by_layer = _numbers_kept_by_layer(architecture, config, fused)
    is_last = stage == layout.pp - 1
    columns = min(TILE_COLUMNS, architecture.padded_vocab_size(layout.tp) // layout.tp)
    return Activations(
        kept=math.ceil(
            number * _layers_under_way(architecture, config, stage, num_microbatches) * (hidden if full else by_layer)
        ),
        recomputed=math.ceil(number * (by_layer - hidden)) if full else 0,
        gradients=math.ceil(number * _gradients_within_layer(architecture, config)),
        final_norm=math.ceil(number * hidden * (2 if fused else 3)) if is_last else 0,
        output_layer=tokens * (14 * columns + 10 * architecture.hidden_size) if is_last else 0,
    )


def engine_memory(config: Config, architecture: Architecture, num_parameters: int, tp: int) -> EngineMemory:
    """Weights, and the cache of keys and values that a token takes, on each of an engine's `tp` GPUs."""
    size = 2 if (config.rollout.engine_dtype or config.model.dtype) == "bf16" else 4
    heads = max(architecture.num_kv_heads // tp, 1)
    return EngineMemory(
        weights=num_parameters * size // tp,
        cache_per_token=2 * architecture.num_layers * heads * architecture.head_dim * size,
    )


def _layers_under_way(architecture: Architecture, config: Config, stage: int, num_microbatches: int) -> float:
    """Layers whose activations wait for their backward, over all micro-batches of a rank of the stage."""
    pp, vpp = config.parallel.pp, config.parallel.vpp or 1
    layers = architecture.num_layers / (pp * vpp)
    if vpp == 1:
        return layers * min(pp - stage, num_microbatches)
    return layers * min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, num_microbatches * vpp)


def _numbers_kept_by_layer(architecture: Architecture, config: Config, fused: bool) -> float:
    """The table above, for one token."""
    layout, a = config.parallel, architecture
    tp, hidden = layout.tp, a.hidden_size / _sequence_shards(config)
    queries = a.num_attention_heads * a.head_dim / tp
    keys = max(a.num_kv_heads / tp, 1) * a.head_dim
    kept = hidden * (4 if fused else 6) + 2 * (queries + keys) + keys + queries
    if a.qk_norm:
        kept += (1 if fused else 2) * queries + keys
    if not fused:
        kept += 4 * a.head_dim + queries + (2 * keys * layout.cp if layout.cp > 1 else 0)
    if not a.num_experts:
        return kept + (3 if fused else 5) * a.ffn_hidden_size / tp
    routed = a.hidden_size + (3 if fused else 6) * a.expert_ffn_hidden_size
    return kept + (a.experts_per_token * routed + 8 * a.num_experts) / _sequence_shards(config)


def _gradients_within_layer(architecture: Architecture, config: Config) -> float:
    a, shards = architecture, _sequence_shards(config)
    if a.num_experts:
        return a.experts_per_token * (3 * a.expert_ffn_hidden_size + 2 * a.hidden_size) / shards
    return 3 * a.ffn_hidden_size / config.parallel.tp + 2 * a.hidden_size / shards


def _sequence_shards(config: Config) -> int:
    return config.parallel.tp if config.parallel.sequence_parallel else 1
