"""The one table that relates Megatron's parameter names to HF's; conversion and weight sync both read it.

A parameter's canonical name is its key in a torch_dist checkpoint: global layer numbers, and norms named as
TransformerEngine fuses them into the linear that follows. A checkpoint stacks the experts of a layer under one key, so
theirs has the expert's global number in it. `canonical_name` maps a live module's names to it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.layout import QKV, GateUp, Layout, Replicated, ReplicatedGateUp, Shape, Sharded, Vocabulary


@dataclass(frozen=True, slots=True)
class _Kind:
    """A row of the table. {i} is the global number of the layer, {e} that of the expert.

    Shapes are spelled in letters: V vocab_size, H hidden_size, F ffn_hidden_size, D head_dim, Q and K the query and the
    key rows (heads x head_dim), E num_experts, X expert_ffn_hidden_size. layout and present are asked with the architecture.
    """

    name: str
    layout: Callable[[Architecture], Layout]
    hf: dict[str, str]  # name: shape, in the order of merging
    present: Callable[[Architecture], bool] = lambda a: True

    @property
    def key(self) -> str:
        return self.name.replace(".{e}", "")


def _vocabulary(a: Architecture) -> Layout:
    return Vocabulary(axis=0, vocab_size=a.vocab_size)


def _qkv(a: Architecture) -> Layout:
    return QKV(0, a.num_kv_heads, a.num_attention_heads // a.num_kv_heads, a.head_dim)


def _gate_up(a: Architecture) -> Layout:
    return GateUp()


def _expert_gate_up(a: Architecture) -> Layout:
    return ReplicatedGateUp()


def _row_parallel(a: Architecture) -> Layout:
    return Sharded(axis=1)


def _replicated(a: Architecture) -> Layout:
    return Replicated()


def _is_dense(a: Architecture) -> bool:
    return not a.num_experts


def _has_experts(a: Architecture) -> bool:
    return a.num_experts > 0


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

_BEFORE_LAYERS = [_Kind(EMBEDDING, _vocabulary, {"model.embed_tokens.weight": "VH"})]
_LAYER = [
    _Kind(
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        _replicated,
        {"model.layers.{i}.input_layernorm.weight": "H"},
    ),
    _Kind(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        _qkv,
        {
            "model.layers.{i}.self_attn.q_proj.weight": "QH",
            "model.layers.{i}.self_attn.k_proj.weight": "KH",
            "model.layers.{i}.self_attn.v_proj.weight": "KH",
        },
    ),
    _Kind(
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        _qkv,
        {
            "model.layers.{i}.self_attn.q_proj.bias": "Q",
            "model.layers.{i}.self_attn.k_proj.bias": "K",
            "model.layers.{i}.self_attn.v_proj.bias": "K",
        },
        present=lambda a: a.qkv_bias,
    ),
    _Kind(
        "decoder.layers.{i}.self_attention.q_layernorm.weight",
        _replicated,
        {"model.layers.{i}.self_attn.q_norm.weight": "D"},
        present=lambda a: a.qk_norm,
    ),
    _Kind(
        "decoder.layers.{i}.self_attention.k_layernorm.weight",
        _replicated,
        {"model.layers.{i}.self_attn.k_norm.weight": "D"},
        present=lambda a: a.qk_norm,
    ),
    _Kind(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        _row_parallel,
        {"model.layers.{i}.self_attn.o_proj.weight": "HQ"},
    ),
    _Kind(
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        _replicated,
        {"model.layers.{i}.post_attention_layernorm.weight": "H"},
        present=_is_dense,
    ),
    _Kind(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        _gate_up,
        {"model.layers.{i}.mlp.gate_proj.weight": "FH", "model.layers.{i}.mlp.up_proj.weight": "FH"},
        present=_is_dense,
    ),
    _Kind(
        "decoder.layers.{i}.mlp.linear_fc2.weight",
        _row_parallel,
        {"model.layers.{i}.mlp.down_proj.weight": "HF"},
        present=_is_dense,
    ),
    _Kind(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        _replicated,
        {"model.layers.{i}.post_attention_layernorm.weight": "H"},
        present=_has_experts,
    ),
    _Kind(
        "decoder.layers.{i}.mlp.router.weight",
        _replicated,
        {"model.layers.{i}.mlp.gate.weight": "EH"},
        present=_has_experts,
    ),
    _Kind(
        "decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight",
        _expert_gate_up,
        {
            "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "XH",
            "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "XH",
        },
        present=_has_experts,
    ),
    _Kind(
        "decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc2.weight",
        _replicated,
        {"model.layers.{i}.mlp.experts.{e}.down_proj.weight": "HX"},
        present=_has_experts,
    ),
]
_AFTER_LAYERS = [
    _Kind("decoder.final_layernorm.weight", _replicated, {"model.norm.weight": "H"}),
    _Kind(OUTPUT_LAYER, _vocabulary, {"lm_head.weight": "VH"}, present=lambda a: not a.tied_embeddings),
]
# Megatron's local layers keep each norm apart from the linear that follows it. So do TransformerEngine's before experts.
_INPUT_NORM = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
_MLP_NORM = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
# An expert's weights in a live layer, by the number that it has on its rank: Megatron's own layers (and the canonical
# name), and TransformerEngine's grouped ones.
_LIVE_EXPERT = re.compile(
    r"mlp\.experts\.(?:(?:local_)?experts\.(?P<local>\d+)\.(?P<linear>linear_fc[12])\.weight"
    r"|(?P<grouped_linear>linear_fc[12])\.weight(?P<grouped>\d+))"
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter and the HF tensors that it holds."""

    name: str  # canonical
    key: str  # in a torch_dist checkpoint; all experts of a layer share one
    layout: Layout
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]  # in the order of hf_names
    expert: int | None = None  # its place along the checkpoint's first axis
    num_experts: int = 0

    @property
    def shape(self) -> Shape:
        """Of the full tensor, over all TP ranks, without vocabulary padding."""
        return self.layout.full_shape(self.hf_shapes)

    @property
    def stored_shape(self) -> Shape:
        """Of the checkpoint's tensor that holds it."""
        return self.shape if self.expert is None else (self.num_experts, *self.shape)

    def from_hf(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The full tensor, from HF tensors by name."""
        return self.layout.merge([tensors[name] for name in self.hf_names])

    def to_hf(self, full: Tensor) -> list[tuple[str, Tensor]]:
        """HF names and tensors, from the full tensor. The tensors may be views of it."""
        return list(zip(self.hf_names, self.layout.split(full), strict=True))

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """What TP rank `tp_rank` of `tp_size` holds, vocabulary padding included. May be a view of `full`."""
        return self.layout.shard(full, tp_rank, tp_size)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor, from one shard a TP rank in order of rank. May be one of them."""
        return self.layout.join(shards)


def parameters(architecture: Architecture) -> list[Parameter]:
    """Every parameter of the model, in the order of a forward pass."""
    return list(iter_parameters(architecture))


def iter_parameters(architecture: Architecture) -> Iterator[Parameter]:
    """`parameters` one by one, for a reader that stops where the files do."""
    kinds = [(_BEFORE_LAYERS, range(1)), (_LAYER, range(architecture.num_layers)), (_AFTER_LAYERS, range(1))]
    for rows, layers in kinds:
        for layer in layers:
            for kind in rows:
                if kind.present(architecture):
                    for expert in range(architecture.num_experts) if kind.key != kind.name else [None]:
                        yield _parameter(kind, architecture, layer, expert)


def hf_shapes(table: Iterable[Parameter]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the HF tensors."""
    for parameter in table:
        yield from zip(parameter.hf_names, parameter.hf_shapes, strict=True)


def _parameter(kind: _Kind, a: Architecture, layer: int, expert: int | None) -> Parameter:
    letters = {
        "V": a.vocab_size,
        "H": a.hidden_size,
        "F": a.ffn_hidden_size,
        "D": a.head_dim,
        "Q": a.num_attention_heads * a.head_dim,
        "K": a.num_kv_heads * a.head_dim,
        "E": a.num_experts,
        "X": a.expert_ffn_hidden_size,
    }
    return Parameter(
        name=kind.name.format(i=layer, e=expert),
        key=kind.key.format(i=layer),
        layout=kind.layout(a),
        hf_names=tuple(name.format(i=layer, e=expert) for name in kind.hf),
        hf_shapes=tuple(tuple(letters[letter] for letter in shape) for shape in kind.hf.values()),
        expert=expert,
        num_experts=a.num_experts,
    )


def canonical_name(architecture: Architecture, live_name: str, layer_offset: int = 0, expert_offset: int = 0) -> str:
    """The canonical name of a parameter of a live GPTModel chunk.

    `live_name` is as named_parameters() has it, with any wrapper's "module.", from Megatron's local or
    TransformerEngine layers. `layer_offset` is the global number of the chunk's first layer, `expert_offset` that of the
    rank's first expert. The last pipeline stage of a tied model holds a copy of the embedding as its output layer: it
    gets the embedding's name too.

    Raises ConvertError for a parameter that the architecture does not have.
    """
    name = live_name
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name == OUTPUT_LAYER and architecture.tied_embeddings:
        return EMBEDDING
    layer, expert = 0, None
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        layer, name = int(match[1]) + layer_offset, match[2]
        norms = dict([_INPUT_NORM] if architecture.num_experts else [_INPUT_NORM, _MLP_NORM])
        if found := _LIVE_EXPERT.fullmatch(name):
            expert = int(found["local"] or found["grouped"]) + expert_offset
            name = f"mlp.experts.experts.{expert}.{found['linear'] or found['grouped_linear']}.weight"
        name = f"decoder.layers.{layer}.{norms.get(name, name)}"
    in_range = layer < architecture.num_layers and (expert is None or expert < architecture.num_experts)
    kinds = [*_BEFORE_LAYERS, *_LAYER, *_AFTER_LAYERS]
    if in_range and any(k.name.format(i=layer, e=expert) == name and k.present(architecture) for k in kinds):
        return name
    raise ConvertError(
        f"{live_name} (layer offset {layer_offset}, expert offset {expert_offset}) is no parameter of "
        f"{architecture.name}. Fix: build the model of the same config.json"
    )
