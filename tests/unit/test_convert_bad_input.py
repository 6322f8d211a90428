"""Input that is damaged or contradicts itself: one line that names it, at once, whatever it holds."""

import ast
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_gppo import convert
from megatron_gppo.convert import (
    Architecture,
    ConvertError,
    HfCheckpoint,
    MegatronCheckpoint,
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_gppo.convert.command_line import num_bytes, run
from megatron_gppo.convert.hf_checkpoint import INDEX_FILE
from tests.support.conversion import assert_refused, edit_config, edit_weights, make

TOOLS = Path(__file__).parents[2] / "tools"
MOE = "Qwen3MoeForCausalLM"
NORM = "model.norm.weight"
DEEP = "[" * 100_000 + "]" * 100_000


# config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling has rope type 'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling has rope type 'linear'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling has a partial_rotary_factor"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            "rope_theta = 1000000.0, rope_parameters.rope_theta = 10000.0 contradict each other",
        ),
        (
            {"rope_parameters": None, "rope_theta": 10**400},
            r"rope_theta = 10*\.\.\. \(401 characters\) is not a positive",
        ),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000 is more than the 1000 that are supported"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers = 10{18} is more than"),
        ({"num_attention_heads": 2 * 10**9}, "num_attention_heads = 2000000000 is more than the 10000"),
        ({"num_hidden_layers": 1000}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is not a bool"),
        ({"model_type": "qwen3"}, "model_type = 'qwen3' contradicts architectures, as Qwen2ForCausalLM's is 'qwen2'"),
    ],
)
def test_a_config_that_contradicts_itself_or_the_files(
    hf: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(hf, **changes)
    started = time.monotonic()
    output = tmp_path / "out" / "m"
    assert_refused(
        lambda: convert_hf_to_megatron(hf, output, tp=3 if "num_attention_heads" in changes else 1), message, output
    )
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
def test_a_mixture_that_contradicts_itself_or_the_files(tmp_path: Path, field: str) -> None:
    hf = make(tmp_path / "hf", architecture=MOE)
    output = tmp_path / "out" / "m"
    edit_config(hf, **{"num_experts": None, "num_local_experts": None, "norm_topk_prob": "no", field: 4})
    assert_refused(lambda: convert_hf_to_megatron(hf, output), "norm_topk_prob = 'no' is not a bool", output)
    edit_config(hf, norm_topk_prob=True, **{field: 10**7})
    assert_refused(lambda: convert_hf_to_megatron(hf, output), f"{field} = 10000000 is more than the 10000", output)
    edit_config(hf, **{field: 10**4})
    message = r"gate.weight has shape \[4, 16\], but config.json asks for \[10000, 16\]"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), message, output)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", MOE])
def test_an_absent_head_dim_is_what_transformers_takes(name: str, tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", architecture=name)
    edit_config(hf, head_dim=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
    architecture = Architecture.from_hf(hf)
    assert architecture.head_dim == model.model.layers[0].self_attn.head_dim
    assert architecture.head_dim == (128 if name == "Qwen3ForCausalLM" else 4)


# JSON


def nest_header(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())


def nest_index(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / INDEX_FILE).write_text(DEEP)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda hf: (hf / "config.json").write_text(DEEP), "config.json: not valid JSON: nested too deep. Fix: "),
        (nest_header, "model.safetensors: not a safetensors file: its header cannot be read. Fix: "),
        (nest_index, f"{INDEX_FILE}: not an index of safetensors files. Fix: "),
    ],
)
def test_json_that_is_nested_too_deep(hf: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(hf)
    output = tmp_path / "out" / "m"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), message, output)


# Weights


def test_weights_of_another_format_say_how_to_save_them(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(
        ConvertError, match=r"hf: has pytorch_model.bin, but .* safetensors alone. Fix: .*save_pretrained"
    ):
        HfCheckpoint(hf)


def test_a_cast_that_overflows_is_named(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(hf, lambda tensors: tensors[NORM][:2].copy_(torch.tensor([3.4e38, float("inf")])))
    convert_hf_to_megatron(hf, tmp_path / "m")
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [f"{NORM} holds NaN or infinity"]
    edit_weights(hf, lambda tensors: tensors[NORM][1:2].fill_(1.0))
    shutil.rmtree(tmp_path / "m")
    convert_hf_to_megatron(hf, tmp_path / "m")
    overflow = f"{NORM} has values too large for bfloat16, which become infinity"
    for action in (
        lambda: convert_hf_to_megatron(hf, tmp_path / "bf16", dtype=torch.bfloat16),
        lambda: convert_megatron_to_hf(tmp_path / "m", tmp_path / "back", dtype=torch.bfloat16),
    ):
        caplog.clear()
        action()
        assert [message.split(": ", 1)[1] for message in caplog.messages] == [overflow]


# Megatron checkpoints


def edited(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def first_tensor(metadata: Any) -> Any:
    return next(iter(metadata.state_dict_metadata.values()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"),
        lambda folder: (folder / ".metadata").write_bytes(b""),
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        lambda folder: (folder / ".metadata").write_bytes(b"X\x02\x00\x00\x00\xff\xff."),  # UnicodeDecodeError
        lambda folder: (folder / ".metadata").write_bytes(b"h\x07."),  # what is not in the memo
        lambda folder: (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-20]),
        edited(lambda metadata: metadata.storage_data.clear()),
        edited(lambda metadata: setattr(metadata, "storage_data", None)),
        edited(lambda metadata: setattr(metadata, "state_dict_metadata", None)),
        edited(lambda metadata: setattr(first_tensor(metadata), "chunks", None)),
        edited(lambda metadata: setattr(first_tensor(metadata), "size", 3)),
        edited(lambda metadata: setattr(first_tensor(metadata), "properties", None)),
    ],
)
def test_damaged_metadata(megatron: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(megatron)
    output = tmp_path / "out" / "hf"
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), r"\.metadata: is damaged \(\w+\). Fix: ", output)


def test_metadata_that_takes_more_memory_than_there_is(megatron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FileSystemReader, "read_metadata", fail)
    with pytest.raises(ConvertError, match=r"\.metadata: is damaged \(MemoryError\). Fix: "):
        MegatronCheckpoint(megatron)


def test_chunks_of_another_dtype_than_the_metadata_says(megatron: Path, tmp_path: Path) -> None:
    def say_bf16(metadata: Any) -> None:
        for stored in metadata.state_dict_metadata.values():
            stored.properties.dtype = torch.bfloat16

    edited(say_bf16)(megatron)
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    message = r"has a chunk \[65, 16\] torch.float32, not \[65, 16\] torch.bfloat16 as .metadata says"
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), message, output)


def test_a_chunk_that_is_there_twice_does_not_stand_for_another(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", architecture=MOE)
    convert_hf_to_megatron(hf, tmp_path / "m")
    key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"

    def repeat(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[key].chunks
        chunks[3] = chunks[0]

    edited(repeat)(tmp_path / "m")
    output = tmp_path / "out" / "hf"
    assert_refused(lambda: convert_megatron_to_hf(tmp_path / "m", output), f"{key} is incomplete", output)


def test_a_chunk_beyond_its_tensor(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", architecture=MOE)
    convert_hf_to_megatron(hf, tmp_path / "m")
    key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"

    def stretch(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata[key].chunks[0]
        chunk.sizes = torch.Size([10**12, *chunk.sizes[1:]])

    edited(stretch)(tmp_path / "m")
    output = tmp_path / "out" / "hf"
    message = rf"\.metadata: is damaged: {key} has a chunk beyond its shape. Fix: "
    assert_refused(lambda: convert_megatron_to_hf(tmp_path / "m", output), message, output)


def test_a_file_that_may_not_be_read_is_not_damaged(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops."""
    open_path = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".distcp":
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    message = r"__0_0.distcp: Permission denied. Fix: see to its permissions"
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), message, output)


# The audit of what was written


def rewritten(module: Any, writer: str, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]) -> None:
    write = getattr(module, writer)

    def write_and_damage(folder: Path, *args: Any) -> None:
        write(folder, *args)
        damage(folder)

    monkeypatch.setattr(module, writer, write_and_damage)


def add_key(metadata: Any) -> None:
    metadata.state_dict_metadata["extra"] = first_tensor(metadata)


def change_dtype(metadata: Any) -> None:
    for stored in metadata.state_dict_metadata.values():
        stored.properties.dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_key, "tensor extra is one too many"),
        (lambda metadata: metadata.state_dict_metadata.popitem(), "has no parameter output_layer.weight"),
        (change_dtype, "the checkpoint has torch.bfloat16, not torch.float32"),
        (lambda metadata: setattr(first_tensor(metadata), "size", torch.Size([64, 16])), r"has shape \[64, 16\], but"),
    ],
)
def test_a_checkpoint_that_was_written_wrong(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], message: str
) -> None:
    rewritten(hf_to_megatron, "write_megatron_checkpoint", monkeypatch, edited(change))
    output = tmp_path / "out" / "m"
    output.parent.mkdir()
    expected = f"what was written is not what was asked for: .*{message}.* Fix: check the disk"
    assert_refused(lambda: convert_hf_to_megatron(hf, output), expected, output)


def add_inv_freq(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)


def to_bf16(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_inv_freq, "tensor model.layers.0.self_attn.rotary_emb.inv_freq is one too many"),
        (lambda tensors: tensors.pop(NORM), f"tensor {NORM} is missing"),
        (to_bf16, "the folder has torch.bfloat16, not torch.float32"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), rf"{NORM} has shape \[3\], but"),
    ],
)
def test_a_folder_that_was_written_wrong(
    megatron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    rewritten(megatron_to_hf, "write_weights", monkeypatch, lambda folder: edit_weights(folder, change))
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    expected = f"what was written is not what was asked for: .*{message}.* Fix: check the disk"
    assert_refused(lambda: convert_megatron_to_hf(megatron, output), expected, output)


# The tools


@pytest.mark.parametrize("size", ["9" * 400, "9" * 5000 + "GB", "1." + "0" * 400 + "MB", "0.1"])
def test_a_size_beyond_all_files(size: str) -> None:
    with pytest.raises(Exception, match="is not a size, as 5GB or 500MB"):
        num_bytes(size)


def test_what_the_operating_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> str:
        raise PermissionError(13, "Permission denied", "/somewhere")

    assert run(refuse, "out") == 2
    assert capsys.readouterr().err == "error: /somewhere: Permission denied. Fix: see to its permissions and the disk\n"


def test_a_dry_run_whose_reader_leaves_ends_quietly(hf: Path, tmp_path: Path) -> None:
    tool = f"{sys.executable} {TOOLS}/convert_hf_to_megatron.py --hf-path {hf} --output {tmp_path}/m --dry-run"
    command = ["bash", "-c", f"{tool} | true; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("tool", ["convert_hf_to_megatron.py", "convert_megatron_to_hf.py"])
def test_an_interruption_of_the_imports_is_one_line(tool: str, tmp_path: Path) -> None:
    """An import that reports itself and waits, in torch's place."""
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{TOOLS.parent}"}
    command = [sys.executable, TOOLS / tool, "--output", "x"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors == "interrupted before it began. Fix: run the same command again\n"


def test_warnings_stand_on_lines_of_their_own(hf: Path, tmp_path: Path) -> None:
    edit_weights(hf, lambda tensors: tensors[NORM][:1].fill_(float("nan")))
    command = [sys.executable, TOOLS / "convert_hf_to_megatron.py", "--hf-path", hf, "--output", tmp_path / "m"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").split("\n") if "holds NaN" in line]
    assert lines == [f"warning: {hf}: {NORM} holds NaN or infinity"]


def test_every_refusal_says_how_to_mend_it() -> None:
    """Also what no test provokes."""
    for path in Path(convert.__file__).parent.glob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ConvertError":
                message = ast.get_source_segment(text, node) or ""
                named = ("Fix:", "_COPY_AGAIN", "_ANOTHER_MODEL", "{fix}", "(loop)")
                assert any(part in message for part in named), f"{path.name}: {message}"
