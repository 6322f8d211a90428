"""Layouts and the name table: exact inverses, in Megatron's order, for any shape."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.convert import Architecture, ConvertError, Parameter, canonical_name, parameters
from megatron_gppo.convert.layout import QKV, GateUp, Vocabulary
from megatron_gppo.convert.stacked_experts import stack, unstack
from tests.support.released_models import PUBLISHED_BILLIONS, write_model_config

ARCHITECTURE = Architecture(
    name="Qwen2ForCausalLM",
    num_layers=6,
    hidden_size=16,
    ffn_hidden_size=20,
    num_attention_heads=12,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=11,
    max_position_embeddings=32,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied_embeddings=True,
    qkv_bias=True,
    qk_norm=False,
    dtype=torch.float32,
)


EXPERTS = replace(
    ARCHITECTURE,
    name="Qwen3MoeForCausalLM",
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    num_experts=6,
    experts_per_token=2,
    expert_ffn_hidden_size=5,
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    kv_heads = draw(st.integers(1, 3))
    name = draw(st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]))
    qwen2 = name == "Qwen2ForCausalLM"
    num_experts = draw(st.integers(1, 5)) if name == "Qwen3MoeForCausalLM" else 0
    return replace(
        ARCHITECTURE,
        name=name,
        num_experts=num_experts,
        experts_per_token=min(num_experts, 2),
        expert_ffn_hidden_size=draw(st.integers(1, 4)) if num_experts else 0,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 5)),
        ffn_hidden_size=draw(st.integers(1, 12)),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 11)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=qwen2,
        qk_norm=not qwen2,
    )


def admits(architecture: Architecture, tp: int) -> bool:
    try:
        architecture.check_layout(tp=tp)
    except ConvertError:
        return False
    return True


@settings(deadline=None)
@given(architectures())
def test_merge_shard_join_and_split_return_every_value(architecture: Architecture) -> None:
    count = 0
    for parameter in parameters(architecture):
        tensors = {}
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
            values = torch.arange(count, count + torch.Size(shape).numel(), dtype=torch.float32)
            tensors[name], count = values.view(shape), count + len(values)
        full = parameter.from_hf(tensors)
        assert tuple(full.shape) == parameter.shape
        for tp in range(1, 13):
            if not admits(architecture, tp):
                continue
            shards = [parameter.shard(full, rank, tp) for rank in range(tp)]
            assert len({shard.shape for shard in shards}) == 1  # Megatron allocates alike on every rank
            assert torch.equal(parameter.join(shards), full)
        back = dict(parameter.to_hf(full))
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@settings(deadline=None)
@given(architectures())
def test_names_are_unique_and_canonical_ones_map_to_themselves(architecture: Architecture) -> None:
    table = parameters(architecture)
    hf_names = [name for parameter in table for name in parameter.hf_names]
    assert len(set(hf_names)) == len(hf_names)
    assert len({parameter.name for parameter in table}) == len(table)
    assert [canonical_name(architecture, parameter.name) for parameter in table] == [p.name for p in table]


@settings(deadline=None)
@given(architectures())
def test_stacking_experts_moves_no_byte(architecture: Architecture) -> None:
    separate = [
        (name, shape) for p in parameters(architecture) for name, shape in zip(p.hf_names, p.hf_shapes, strict=True)
    ]
    back = [part for name, shape in stack(dict(separate)).items() for part in unstack(name, shape) or [(name, shape)]]
    assert back == separate  # names in the order of their bytes, hence the bytes
    assert (len(stack(dict(separate))) < len(separate)) == (architecture.num_experts > 0)


@settings(deadline=None)
@given(architectures())
def test_the_experts_of_a_layer_share_a_key_and_tile_it(architecture: Architecture) -> None:
    by_key: dict[str, list[Parameter]] = {}
    for parameter in parameters(architecture):
        by_key.setdefault(parameter.key, []).append(parameter)
    for key, members in by_key.items():
        experts = [member.expert for member in members]
        assert experts == (list(range(architecture.num_experts)) if "experts" in key else [None])
        assert {member.stored_shape for member in members} == {members[0].stored_shape}


def test_qkv_rows_follow_the_query_groups() -> None:
    layout = QKV(axis=0, num_groups=2, heads_per_group=2, head_dim=1)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert layout.merge([q, k, v]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_up_shards_hold_both_halves_of_their_columns() -> None:
    full = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert GateUp().shard(full, 1, 2).tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros_to_equal_shards() -> None:
    layout = Vocabulary(axis=0, vocab_size=5)
    full = torch.arange(1, 6).view(5, 1)
    assert [layout.shard(full, rank, 4).flatten().tolist() for rank in range(4)] == [[1, 2], [3, 4], [5, 0], [0, 0]]


@pytest.mark.parametrize(
    ("live", "offset", "canonical"),
    [
        ("decoder.layers.1.input_layernorm.weight", 4, "decoder.layers.5.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", 0, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
        ("module.module.decoder.layers.0.mlp.linear_fc2.weight", 2, "decoder.layers.2.mlp.linear_fc2.weight"),
        ("module.embedding.word_embeddings.weight", 4, "embedding.word_embeddings.weight"),
        ("output_layer.weight", 4, "embedding.word_embeddings.weight"),
    ],
)
def test_live_names_become_canonical(live: str, offset: int, canonical: str) -> None:
    assert canonical_name(ARCHITECTURE, live, offset) == canonical


@pytest.mark.parametrize(
    ("live", "canonical"),
    [
        ("mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.experts.4.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight2", "mlp.experts.experts.5.linear_fc2.weight"),  # TransformerEngine's
        ("mlp.router.weight", "mlp.router.weight"),
        ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ],
)
def test_live_names_of_experts_become_canonical(live: str, canonical: str) -> None:
    name = canonical_name(EXPERTS, f"module.decoder.layers.1.{live}", layer_offset=2, expert_offset=3)
    assert name == f"decoder.layers.3.{canonical}"


def test_an_expert_beyond_the_last_is_no_parameter() -> None:
    with pytest.raises(ConvertError, match="expert offset 4"):
        canonical_name(EXPERTS, "decoder.layers.0.mlp.experts.linear_fc2.weight2", 0, 4)


@pytest.mark.parametrize(
    ("live", "offset"),
    [
        ("decoder.layers.2.mlp.linear_fc2.weight", 4),
        ("decoder.layers.0.mlp.linear_fc2.bias", 0),
        ("decoder.layers.0.self_attention.q_layernorm.weight", 0),
        ("position_embeddings.weight", 0),
    ],
)
def test_an_unknown_live_name_raises(live: str, offset: int) -> None:
    with pytest.raises(ConvertError, match="is no parameter of Qwen2ForCausalLM"):
        canonical_name(ARCHITECTURE, live, offset)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 5}, r"tp = 5 does not divide num_attention_heads = 12 .* one of \[1, 2, 4\]"),
        ({"tp": 3}, "tp = 3 neither divides nor is a multiple of num_key_value_heads = 2"),
        ({"tp": 6}, "tp = 6 does not divide intermediate_size = 20"),
        ({"pp": 7}, "pp = 7 is larger than num_hidden_layers = 6"),
        ({"pp": 4}, r"pp = 4 does not divide num_hidden_layers = 6 .* one of \[1, 2, 3, 6\]"),
        ({"pp": 2, "vpp": 2}, r"pp \* vpp = 2 \* 2 does not divide num_hidden_layers = 6"),
        ({"ep": 2}, "ep = 2, but Qwen2ForCausalLM has no experts"),
    ],
)
def test_impossible_layouts_name_the_field_and_the_fix(layout: dict[str, int], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        ARCHITECTURE.check_layout(**layout)


def test_experts_are_dealt_out_whole() -> None:
    EXPERTS.check_layout(tp=4, ep=3)
    with pytest.raises(ConvertError, match=r"ep = 4 does not divide num_experts = 6 .* one of \[1, 2, 3, 6\]"):
        EXPERTS.check_layout(ep=4)


@pytest.mark.parametrize("model", PUBLISHED_BILLIONS)
def test_released_models_have_as_many_parameters_as_published(model: str, tmp_path: Path) -> None:
    table = parameters(Architecture.from_hf(write_model_config(tmp_path, model)))
    published = PUBLISHED_BILLIONS[model]
    assert sum(math.prod(p.shape) for p in table) / 1e9 == pytest.approx(
        published, abs=0.006 if published < 10 else 0.06
    )
