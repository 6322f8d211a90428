"""Conversion both ways: bit for bit, and for every bad input an error that names it and leaves nothing behind."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gppo.convert import (
    Architecture,
    ConvertError,
    MegatronCheckpoint,
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    parameters,
)
from megatron_gppo.convert import megatron_checkpoint as megatron_files
from megatron_gppo.convert.hf_checkpoint import INDEX_FILE, HfCheckpoint
from megatron_gppo.convert.hf_weights import write_weights
from megatron_gppo.convert.output_folder import output_folder
from tests.support.conversion import assert_refused, damage_truncate, edit_config, edit_weights, make, weights
from tests.support.tiny import make_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2_tied_bf16": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "qwen2_one_kv_head": {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 1},
    "qwen2_six_heads": {
        "architecture": "Qwen2ForCausalLM",
        "hidden_size": 18,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "vocab_size": 71},
    "qwen3_tied_bf16": {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "qwen3_one_head_each": {"architecture": "Qwen3ForCausalLM", "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3_shards": {"architecture": "Qwen3ForCausalLM", "max_shard_size": "10KB"},
    "qwen3_moe": {"architecture": "Qwen3MoeForCausalLM"},
    "qwen3_moe_stacked": {"architecture": "Qwen3MoeForCausalLM", "stacked_experts": True, "dtype": torch.bfloat16},
    "qwen3_moe_stacked_shards": {
        "architecture": "Qwen3MoeForCausalLM",
        "stacked_experts": True,
        "max_shard_size": "10KB",
        "num_experts": 5,
        "moe_intermediate_size": 7,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}


# Round trip


@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_is_bitwise(name: str, tmp_path: Path) -> None:
    original = make(tmp_path / "original", **MODELS[name])
    convert_hf_to_megatron(original, tmp_path / "megatron")
    shutil.move(original, tmp_path / "gone")  # exporting must not need it
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")

    ours, theirs = weights(tmp_path / "back"), weights(tmp_path / "gone")
    assert ours.keys() == theirs.keys()
    for tensor_name in theirs:
        assert ours[tensor_name].dtype == theirs[tensor_name].dtype
        assert torch.equal(ours[tensor_name], theirs[tensor_name]), tensor_name
    for asset in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / asset).read_bytes() == (tmp_path / "gone" / asset).read_bytes()


def test_an_exported_folder_loads_in_transformers_as_it_is(megatron: Path, hf: Path, tmp_path: Path) -> None:
    convert_megatron_to_hf(megatron, tmp_path / "back")
    ids = torch.arange(10)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path / "back", hf)]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template is not None


def test_infinities_nan_and_negative_zero_survive_with_a_warning(
    hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    special = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf")])
    edit_weights(hf, lambda tensors: tensors["model.norm.weight"][:4].copy_(special))
    with caplog.at_level(logging.WARNING):
        convert_hf_to_megatron(hf, tmp_path / "megatron")
    assert [record for record in caplog.messages if "model.norm.weight holds NaN or infinity" in record]
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = weights(tmp_path / "back")["model.norm.weight"]
    assert torch.equal(back.view(torch.int32), weights(hf)["model.norm.weight"].view(torch.int32))


def test_weights_are_cut_into_indexed_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_weights(tmp_path, shapes, torch.float32, iter(tensors.values()), max_shard_bytes=16)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(range(1, 6))
    assert [int(file[6:11]) for file in index["weight_map"].values()] == [1, 1, 2, 3, 4]  # 4+8, 12, 16, and 20 alone
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_checkpoint_of_several_files_reads_back(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_files, "MAX_FILE_BYTES", 5000)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert all(torch.equal(tensor, weights(hf)[name]) for name, tensor in weights(tmp_path / "back").items())


def test_a_checkpoint_pickles_no_class_of_megatron(megatron: Path) -> None:
    assert b"megatron" not in (megatron / ".metadata").read_bytes()


def test_harmless_surplus_tensors_are_left_out(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(hf, add)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    stored = MegatronCheckpoint(tmp_path / "megatron").metadata.state_dict_metadata
    assert stored.keys() == {parameter.name for parameter in parameters(Architecture.from_hf(hf))}


# config.json


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_an_architecture_comes_from_config_json(name: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, name, tie_word_embeddings=True, dtype=torch.bfloat16)
    is_qwen3 = name == "Qwen3ForCausalLM"
    expected = Architecture(
        name=name,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=24 if is_qwen3 else 16,
        vocab_size=65,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tied_embeddings=True,
        qkv_bias=not is_qwen3,
        qk_norm=is_qwen3,
        dtype=torch.bfloat16,
    )
    assert Architecture.from_hf(folder) == expected
    # as transformers 4 wrote it
    edit_config(folder, rope_parameters=None, dtype=None, rope_theta=1e6, torch_dtype="bfloat16", rope_scaling=None)
    assert Architecture.from_hf(folder).rope_theta == 1e6
    assert Architecture.from_hf(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "LlamaForCausalLM is not supported. Supported: Qwen2ForCausalLM, Qwen3",
        ),
        ({"architectures": None}, "architecture None is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "16"}, "hidden_size = '16' is not a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"num_attention_heads": 6}, "num_attention_heads = 6 does not divide hidden_size = 16"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; only 'silu' is"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = .* is not supported"),
        ({"dtype": "float16"}, "dtype float16 is not supported"),
        ({"dtype": ["bfloat16"]}, r"dtype = \['bfloat16'\] is not a str"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures = 'Qwen2ForCausalLM' is not a list"),
        ({"layer_types": 3}, "layer_types = 3 is not a list"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default' is not a dict"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6' is not a positive number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06 is not a positive number"),
    ],
)
def test_a_config_that_cannot_be_used(hf: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(hf, **changes)
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), f"config.json: .*{message}", output.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported; only \[\] is"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 of num_experts = 4"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob = True with num_experts_per_tok = 1"),
        ({"num_local_experts": None}, "num_experts is missing"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ],
)
def test_a_mixture_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf = make(tmp_path / "hf", architecture="Qwen3MoeForCausalLM")
    edit_config(hf, **changes)
    with pytest.raises(ConvertError, match=f"config.json: .*{message}"):
        Architecture.from_hf(hf)


def test_a_mixture_comes_from_config_json(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", architecture="Qwen3MoeForCausalLM", norm_topk_prob=False)
    edit_config(hf, num_local_experts=None, num_experts=4)  # as transformers 4 wrote it
    found = Architecture.from_hf(hf)
    assert (found.num_experts, found.experts_per_token, found.expert_ffn_hidden_size) == (4, 2, 40)
    assert not found.normalized_routing


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "not valid JSON"), ("[]", "holds a list")])
def test_a_config_that_cannot_be_read(hf: Path, tmp_path: Path, text: str | None, message: str) -> None:
    (hf / "config.json").unlink()
    if text is not None:
        (hf / "config.json").write_text(text)
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), f"config.json: .*{message}", output.parent)


# Weights

BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(BIAS), f"tensor {BIAS} is missing"),
        (lambda t: t.update(surplus=torch.ones(2)), "tensor surplus is not one that config.json asks for"),
        (lambda t: t.update({BIAS: torch.ones(9)}), rf"tensor {BIAS} has shape \[9\], but config.json asks for \[8\]"),
        (lambda t: t.update({BIAS: t[BIAS].half()}), f"tensor {BIAS} has dtype F16; only F32, BF16 are supported"),
        (lambda t: t.update({BIAS: t[BIAS].bfloat16()}), f"weights of several dtypes .*{BIAS} is torch.bfloat16"),
    ],
)
def test_weights_that_are_not_the_models(
    hf: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_weights(hf, change)
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), message, output.parent)


STACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(STACKED), r"tensor model.layers.0.mlp.experts.0.gate_proj.weight is missing"),
        (
            lambda t: t.update({STACKED: t[STACKED][:3]}),
            r"tensor model.layers.0.mlp.experts.3.gate_proj.weight is missing",
        ),
        (
            lambda t: t.update({STACKED: t[STACKED][:, :-1]}),
            "tensor model.layers.0.mlp.experts.0.gate_proj.weight is missing",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(40, 16)}),
            "holds model.layers.0.mlp.experts.0.up_proj.weight, which .* holds, too",
        ),
    ],
)
def test_stacked_experts_that_are_not_the_models(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    hf = make(tmp_path / "hf", architecture="Qwen3MoeForCausalLM", stacked_experts=True)
    edit_weights(hf, lambda tensors: (change(tensors), tensors.update({k: v.contiguous() for k, v in tensors.items()})))
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), message, output.parent)


def test_a_tied_model_with_another_lm_head(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", tie_word_embeddings=True)
    edit_weights(hf, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    output = tmp_path / "out" / "megatron"
    message = "lm_head.weight differs from the embedding, but config.json says tie_word_embeddings = true"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), message, output.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "truncated: tensor .* ends at byte"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated, or not a safetensors file"),
        (lambda path: path.write_bytes(b"abc"), "truncated, or not a safetensors file"),
        (
            lambda path: path.write_bytes((8).to_bytes(8, "little") + b"notjson!" * 2),
            "not a safetensors file: its header cannot be read",
        ),
        (lambda path: path.unlink(), "is missing, but model.safetensors.index.json names it"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    hf = make(tmp_path / "hf", max_shard_size="10KB")
    shard = sorted(hf.glob("*.safetensors"))[1]
    damage(shard)
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), f"{shard.name}: {message}", output.parent)


def edit_norm(**changes: Any) -> Callable[[Path], object]:
    """Sets fields of one tensor's entry in a safetensors header."""

    def edit(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        header["model.norm.weight"].update(changes)
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 64]}, r"damaged: its header places tensor \S+ at \[0, .*, but the one before ends at"),
        ({"data_offsets": [-64, 0]}, "not a safetensors file: its header cannot be read"),
        ({"data_offsets": ["0", "64"]}, "not a safetensors file: its header cannot be read"),
        ({"data_offsets": [0, 4, 64]}, "damaged: its header places tensor"),
        ({"shape": [16.0]}, "not a safetensors file: its header cannot be read"),
        ({"shape": [17]}, r"tensor model.norm.weight of shape \[17\] and dtype F32 takes 64 bytes"),
        ({"dtype": "F64"}, "tensor model.norm.weight has dtype F64; only F32, BF16 are supported"),
        ({"dtype": "I8"}, "tensor model.norm.weight has dtype I8; only F32, BF16 are supported"),
    ],
)
def test_a_header_that_lies(hf: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    edit_norm(**change)(hf / "model.safetensors")
    output = tmp_path / "out" / "megatron"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), f"model.safetensors: {message}", output.parent)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", max_shard_size="10KB")
    (hf / INDEX_FILE).unlink()
    (hf / "model.safetensors").mkdir()
    with pytest.raises(ConvertError, match=r"hf: has neither model\.safetensors nor"):
        HfCheckpoint(hf)
    (hf / INDEX_FILE).mkdir()
    with pytest.raises(ConvertError, match=f"{INDEX_FILE}: Is a directory"):
        HfCheckpoint(hf)


def test_shards_may_be_symbolic_links(tmp_path: Path) -> None:
    """As the Hugging Face hub's cache stores them."""
    hf = make(tmp_path / "hf", max_shard_size="10KB")
    (tmp_path / "blobs").mkdir()
    shards = sorted(hf.glob("*.safetensors"))
    for shard in shards:
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(tmp_path / "blobs" / shard.name)
    convert_hf_to_megatron(hf, tmp_path / "megatron", verify=True)
    (tmp_path / "blobs" / shards[0].name).unlink()
    with pytest.raises(ConvertError, match=f"{shards[0].name}: is missing, but {INDEX_FILE} names it"):
        HfCheckpoint(hf)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", max_shard_size="10KB")
    shards = sorted(hf.glob("*.safetensors"))
    first = load_file(shards[0])
    save_file(load_file(shards[1]) | first, shards[1])
    with pytest.raises(ConvertError, match=f"{shards[1].name}: holds .*, which {INDEX_FILE} places {shards[0].name}"):
        HfCheckpoint(hf)


def test_an_index_that_does_not_match_its_shards(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", max_shard_size="10KB")
    index = json.loads((hf / INDEX_FILE).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (hf / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConvertError, match=f"{first}: holds {name}, which {INDEX_FILE} places {second}"):
        HfCheckpoint(hf)
    (hf / INDEX_FILE).write_text('{"weight_map": {}}')
    with pytest.raises(ConvertError, match=f"{INDEX_FILE}: its weight_map names no tensors"):
        HfCheckpoint(hf)
    (hf / INDEX_FILE).write_text("{}")
    with pytest.raises(ConvertError, match="not an index of safetensors files"):
        HfCheckpoint(hf)


def test_a_folder_without_weights(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        HfCheckpoint(hf)


# Megatron checkpoints


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "metadata.json: cannot be read"),
        (lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "is not of a torch_dist"),
        (lambda folder: (folder / ".metadata").unlink(), ".metadata: is missing, so the checkpoint is incomplete"),
        (lambda folder: shutil.rmtree(folder / "hf"), "hf: is missing, so nothing says what model this is"),
        (lambda folder: (folder / "hf" / "config.json").unlink(), "hf/config.json: No such file"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp: embedding.word_embeddings.weight cannot be"),
        (lambda folder: damage_truncate(folder / "__0_0.distcp"), "__0_0.distcp: output_layer.weight cannot be read"),
        (
            lambda folder: edit_config(folder / "hf", num_hidden_layers=3),
            "has no parameter decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        ),
        (lambda folder: edit_config(folder / "hf", num_hidden_layers=1), "has more than num_hidden_layers = 1 layers"),
        (
            lambda folder: edit_config(folder / "hf", intermediate_size=24),
            r"mlp.linear_fc1.weight has shape \[40, 16\], but Qwen2ForCausalLM as configured has \[48, 16\]",
        ),
        (lambda folder: edit_config(folder / "hf", vocab_size=66), r"word_embeddings.weight has shape \[65, 16\]"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    megatron: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(megatron)
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), message, output)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_the_checkpoint_holds_every_parameter_in_its_shape(name: str, tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", **MODELS[name])
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    checkpoint = MegatronCheckpoint(tmp_path / "megatron")
    table = parameters(Architecture.from_hf(hf))
    assert checkpoint.metadata.state_dict_metadata.keys() == {parameter.key for parameter in table}
    assert all(tuple(checkpoint.read(parameter).shape) == parameter.shape for parameter in table)


def edit_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.state_dict_metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


EXPERTS_KEY = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stored: stored[EXPERTS_KEY].chunks.pop(),
            f"{EXPERTS_KEY} is incomplete: some of its chunks are missing",
        ),
        (lambda stored: stored.pop(EXPERTS_KEY), f"has no parameter {EXPERTS_KEY}"),
        (
            lambda stored: stored.update({"decoder.layers.1.mlp.extra.weight": stored[EXPERTS_KEY]}),
            "decoder.layers.1.mlp.extra.weight is no parameter of Qwen3MoeForCausalLM as configured",
        ),
        (
            lambda stored: setattr(stored[EXPERTS_KEY].properties, "dtype", torch.bfloat16),
            f"weights of several dtypes .*{EXPERTS_KEY} is torch.bfloat16",
        ),
    ],
)
def test_a_checkpoint_whose_parameters_are_not_the_models(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    hf = make(tmp_path / "hf", architecture="Qwen3MoeForCausalLM")
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    edit_metadata(tmp_path / "megatron", change)
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    assert_refused(lambda: convert_megatron_to_hf(tmp_path / "megatron", output), message, output)


def test_unpickling_a_chunk_that_is_no_tensor_is_an_error(megatron: Path, tmp_path: Path) -> None:
    path = megatron / "__0_0.distcp"
    path.write_bytes(b"x" * path.stat().st_size)
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    message = "__0_0.distcp: .* cannot be read; the file is damaged"
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), message, output)


# Output folders


def test_an_output_in_use_is_refused_and_replaced_only_on_demand(hf: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "megatron"
    output.mkdir(parents=True)
    (output / "precious").write_text("data")
    assert_refused(lambda: convert_hf_to_megatron(hf, output), "is not empty. Fix: give a new folder", output)
    convert_hf_to_megatron(hf, output, overwrite=True)
    assert not (output / "precious").exists()
    assert [path.name for path in output.parent.iterdir()] == ["megatron"]
    MegatronCheckpoint(output).check(Architecture.from_hf(hf))


def test_an_empty_output_folder_is_used(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    assert (tmp_path / "megatron" / "metadata.json").exists()


@pytest.mark.parametrize("output", ["hf", "."])
def test_the_source_is_never_replaced(hf: Path, tmp_path: Path, output: str) -> None:
    with pytest.raises(ConvertError, match="holds the source"):
        convert_hf_to_megatron(hf, tmp_path / output, overwrite=True)
    assert (hf / "model.safetensors").exists()


def test_an_output_that_cannot_be_made(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="file: is a file"):
        convert_hf_to_megatron(hf, tmp_path / "file")
    with pytest.raises(ConvertError, match=r"as .*file is a file"):
        convert_hf_to_megatron(hf, tmp_path / "file" / "megatron")


def test_a_disk_that_is_too_small_is_seen_before_writing(hf: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConvertError, match=r"needs .* GB, but only .* GB are free on its disk"),
        output_folder(tmp_path / "out", hf, num_bytes=2**62),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_the_output_as_it_was(
    hf: Path, tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    output = tmp_path / "out" / "megatron"
    if overwrite:
        output.mkdir(parents=True)
        (output / "precious").write_text("data")

    def run() -> None:
        with output_folder(output, hf, 0, overwrite) as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(error):
        run()
    assert [path.name for path in output.parent.rglob("*")] == (["megatron", "precious"] if overwrite else [])
