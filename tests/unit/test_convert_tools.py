"""The conversion tools as a user runs them: what they print and write, how mistakes and interruptions end."""

import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.convert import Architecture, HfCheckpoint, convert_hf_to_megatron, parameters
from megatron_gppo.convert.hf_checkpoint import INDEX_FILE
from megatron_gppo.convert.memory import same_bits
from tests.support.conversion import damage_truncate, edit_config, edit_weights, make, weights

TOOLS = Path(__file__).parents[2] / "tools"
TO_MEGATRON, TO_HF = "convert_hf_to_megatron.py", "convert_megatron_to_hf.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a tool in this process, which saves seconds of imports. Returns exit status, output, errors."""

    def run(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()  # what making the model printed
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        signal.signal(signal.SIGINT, before)
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


Tool = Callable[..., tuple[int, str, str]]

# Both ways


def run_tool(name: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / name, *map(str, args)], capture_output=True, text=True, timeout=300, **options
    )


def test_the_tools_convert_both_ways(hf: Path, tmp_path: Path) -> None:
    there = run_tool("convert_hf_to_megatron.py", "--hf-path", hf, "--output", tmp_path / "m", "--tp", 2, "--pp", 2)
    assert there.returncode == 0, there.stderr
    back = run_tool("convert_megatron_to_hf.py", "--checkpoint", tmp_path / "m", "--output", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert "100%" in back.stderr
    assert all(torch.equal(tensor, weights(hf)[name]) for name, tensor in weights(tmp_path / "back").items())


def test_the_tools_answer_a_mistake_with_one_line_and_code_2(hf: Path, tmp_path: Path) -> None:
    result = run_tool("convert_hf_to_megatron.py", "--hf-path", hf, "--output", tmp_path / "m", "--tp", 3)
    assert result.returncode == 2
    assert result.stderr.startswith("error: tp = 3 does not divide num_attention_heads = 4 of Qwen2ForCausalLM. Fix:")
    assert len(result.stderr.splitlines()) == 1
    result = run_tool("convert_megatron_to_hf.py", "--checkpoint", tmp_path / "none", "--output", tmp_path / "back")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("tool", "source_flag", "source"),
    [
        ("convert_hf_to_megatron.py", "--hf-path", "hf"),
        ("convert_megatron_to_hf.py", "--checkpoint", "megatron"),
    ],
)
def test_a_write_that_fails_half_way_leaves_nothing(
    megatron: Path, tmp_path: Path, tool: str, source_flag: str, source: str
) -> None:
    """A limit on the size of files makes write() fail as a full disk does."""
    output = tmp_path / "out" / "converted"
    result = run_tool(
        tool,
        source_flag,
        tmp_path / source,
        "--output",
        output,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert result.returncode == 2, result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert list(output.parent.iterdir()) == []


# What is asked for


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtype_converts_the_values_and_the_config_says_so(
    tool: Tool, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    other = {"bf16": torch.float32, "fp32": torch.bfloat16}[dtype]
    hf = make(tmp_path / "hf", dtype=other)
    assert tool(TO_MEGATRON, "--hf-path", hf, "--output", tmp_path / "early", "--dtype", dtype, "--verify")[0] == 0
    assert tool(TO_HF, "--checkpoint", tmp_path / "early", "--output", tmp_path / "a", "--verify")[0] == 0
    assert tool(TO_MEGATRON, "--hf-path", hf, "--output", tmp_path / "late")[0] == 0
    late = ["--checkpoint", tmp_path / "late", "--output", tmp_path / "b", "--dtype", dtype, "--verify"]
    assert tool(TO_HF, *late)[0] == 0
    for folder in (tmp_path / "a", tmp_path / "b"):
        ours = weights(folder)
        assert all(same_bits(ours[name], tensor.to(expected)) for name, tensor in weights(hf).items())
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == expected


def test_shards_are_as_large_as_asked(tool: Tool, megatron: Path, hf: Path, tmp_path: Path) -> None:
    back = ["--checkpoint", megatron, "--output", tmp_path / "back"]
    assert tool(TO_HF, *back, "--max-shard-size", "8KB", "--verify")[0] == 0
    files = list((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 2
    assert len(json.loads((tmp_path / "back" / INDEX_FILE).read_text())["weight_map"]) == len(weights(hf))
    assert all(torch.equal(tensor, weights(hf)[name]) for name, tensor in weights(tmp_path / "back").items())
    status, _, errors = tool(TO_HF, *back, "--max-shard-size", "8 potatoes")
    assert status == 2
    assert "'8 potatoes' is not a size, as 5GB or 500MB" in errors


def test_experts_are_written_as_asked(tool: Tool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = make(tmp_path / "hf", architecture="Qwen3MoeForCausalLM", stacked_experts=True)
    convert_hf_to_megatron(hf, tmp_path / "m")
    back = tmp_path / "back"
    assert tool(TO_HF, "--checkpoint", tmp_path / "m", "--output", back)[0] == 0
    assert HfCheckpoint(back).stacked_experts
    assert "--experts separate" in caplog.text
    caplog.clear()
    separate = tmp_path / "separate"
    assert tool(TO_HF, "--checkpoint", tmp_path / "m", "--output", separate, "--experts", "separate")[0] == 0
    assert "--experts" not in caplog.text
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in weights(separate)
    # Not the logits: their last bits depend on how the tensors lie in memory.
    source, *written = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (hf, back, separate)]
    for loaded in written:
        assert loaded.keys() == source.keys()
        assert all(torch.equal(loaded[name], source[name]) for name in source)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_dry_run_prints_every_tensor_and_writes_nothing(tool: Tool, tmp_path: Path, architecture: str) -> None:
    hf = make(tmp_path / "hf", architecture=architecture)
    convert_hf_to_megatron(hf, tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    for arguments in ([TO_MEGATRON, "--hf-path", hf], [TO_HF, "--checkpoint", tmp_path / "m"]):
        status, output, _ = tool(*arguments, "--output", tmp_path / "out" / "x", "--dry-run", "--dtype", "bf16")
        assert status == 0
        rows = {line.split()[0]: line for line in output.splitlines() if line.startswith(("model.", "lm_head."))}
        assert rows.keys() == weights(hf).keys()
        for parameter in parameters(Architecture.from_hf(hf)):
            for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
                assert parameter.key in rows[name]
                assert parameter.layout.rule in rows[name]
                assert rows[name].endswith(" x ".join(map(str, shape)))
        count = sum(tensor.numel() for tensor in weights(hf).values())
        assert f"{count:,} parameters" in output
        assert f"write  {count * 2 / 1e9:.3f} GB (bfloat16)" in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [TO_MEGATRON, TO_HF])
def test_verify_finds_a_flipped_bit(
    tool: Tool, megatron: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A disk that gives back other bytes than it was given."""
    to_megatron = name == TO_MEGATRON
    module = f"megatron_gppo.convert.{'hf_to_megatron' if to_megatron else 'megatron_to_hf'}"
    writer = "write_megatron_checkpoint" if to_megatron else "write_weights"
    write = getattr(sys.modules[module], writer)
    embedding = weights(hf)["model.embed_tokens.weight"].numpy().tobytes()

    def write_and_damage(folder: Path, *args: Any) -> None:
        write(folder, *args)
        path = folder / ("__0_0.distcp" if to_megatron else "model.safetensors")
        content = bytearray(path.read_bytes())
        content[content.index(embedding)] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(sys.modules[module], writer, write_and_damage)
    source = ("--hf-path", hf) if to_megatron else ("--checkpoint", megatron)
    status, _, errors = tool(name, *source, "--output", tmp_path / "out" / "x", "--verify")
    assert status == 2
    assert "read back with other bits" in errors.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


# Mistakes: every one is a line, exit status 2, and nothing written


def drop_config(hf: Path) -> None:
    (hf / "config.json").unlink()


def name_a_missing_file(hf: Path) -> None:
    tensors = dict.fromkeys(weights(hf), "model-00001-of-00002.safetensors")
    (hf / "model.safetensors").unlink()
    (hf / INDEX_FILE).write_text(json.dumps({"weight_map": tensors}))


NORM = "model.norm.weight"
HF_MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (drop_config, "config.json: No such file or directory. Fix: give the folder of an HF model"),
    "architecture": (
        lambda hf: edit_config(hf, architectures=["MixtralForCausalLM"]),
        "MixtralForCausalLM is not supported. Supported: Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM",
    ),
    "missing tensor": (lambda hf: edit_weights(hf, lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "extra tensor": (lambda hf: edit_weights(hf, lambda t: t.update(x=torch.ones(1))), "tensor x is not one that"),
    "shape": (lambda hf: edit_weights(hf, lambda t: t.update({NORM: torch.ones(3)})), f"{NORM} has shape [3], but"),
    "dtype": (
        lambda hf: edit_weights(hf, lambda t: t.update({NORM: t[NORM].half()})),
        f"{NORM} has dtype F16; only F32, BF16 are supported",
    ),
    "mixed dtypes": (
        lambda hf: edit_weights(hf, lambda t: t.update({NORM: t[NORM].bfloat16()})),
        f"{NORM} is torch.bfloat16). Fix: save the model in one",
    ),
    "truncated": (lambda hf: damage_truncate(hf / "model.safetensors"), "model.safetensors: truncated: tensor"),
    "missing shard": (name_a_missing_file, f"00001-of-00002.safetensors: is missing, but {INDEX_FILE} names it"),
}


@pytest.mark.parametrize("case", HF_MISTAKES)
def test_hf_folders_that_cannot_be_converted(tool: Tool, hf: Path, tmp_path: Path, case: str) -> None:
    damage, message = HF_MISTAKES[case]
    damage(hf)
    arguments = ["--hf-path", hf, "--output", tmp_path / "out" / "x"]
    for status, output, errors in (tool(TO_MEGATRON, *arguments), tool(TO_MEGATRON, *arguments, "--dry-run")):
        assert (status, output) == (2, "")
        assert errors.startswith("error: ")
        assert message in errors
        assert ". Fix: " in errors
        assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_model_config(tool: Tool, megatron: Path, tmp_path: Path) -> None:
    shutil.rmtree(megatron / "hf")
    status, _, errors = tool(TO_HF, "--checkpoint", megatron, "--output", tmp_path / "out" / "x")
    assert status == 2
    assert "nothing says what model this is. Fix: put the HF model's config.json" in errors
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(
    tool: Tool, megatron: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for arguments in ([TO_MEGATRON, "--hf-path", hf], [TO_HF, "--checkpoint", megatron]):
        status, _, errors = tool(*arguments, "--output", tmp_path / "out" / "x")
        assert status == 2
        assert "needs 0.0 GB, but only 0.0 GB are free on its disk" in errors
        assert not (tmp_path / "out").exists()


def test_an_output_in_use(tool: Tool, megatron: Path, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    for arguments in ([TO_MEGATRON, "--hf-path", hf], [TO_HF, "--checkpoint", megatron]):
        status, _, errors = tool(*arguments, "--output", tmp_path / "out")
        assert status == 2
        assert "out: is not empty. Fix: give a new folder, or --overwrite" in errors
        assert (tmp_path / "out" / "precious").read_text() == "data"
    assert tool(TO_MEGATRON, "--hf-path", hf, "--output", tmp_path / "out", "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "precious").exists()


def test_nan_is_converted_and_named(tool: Tool, hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(hf, lambda tensors: tensors[NORM][:1].fill_(float("nan")))
    assert tool(TO_MEGATRON, "--hf-path", hf, "--output", tmp_path / "m", "--verify")[0] == 0
    assert f"{NORM} holds NaN or infinity" in caplog.text
    caplog.clear()
    assert tool(TO_HF, "--checkpoint", tmp_path / "m", "--output", tmp_path / "back", "--verify")[0] == 0
    assert caplog.text.count("holds NaN or infinity") == 1
    assert NORM in caplog.text


# Interruptions

SLOWED = """
import runpy, sys, time
from pathlib import Path
from megatron_gppo.convert import hf_to_megatron
half_way, sys.argv = Path(sys.argv[1]), sys.argv[2:]
def slow(source, table):
    for i, item in enumerate(read_full(source, table)):
        if i == 5:
            half_way.touch()
            time.sleep(60)
        yield item
read_full, hf_to_megatron.read_full = hf_to_megatron.read_full, slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_the_destination_as_it_was(
    tool: Tool, hf: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """Half way through, in a process of its own that waits there."""
    output = tmp_path / "out" / "m"
    output.mkdir(parents=True)
    (output / "precious").write_text("data")
    command = [str(TOOLS / TO_MEGATRON), "--hf-path", str(hf), "--output", str(output), "--overwrite"]
    half_way = tmp_path / "half-way"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, str(half_way), *command], stderr=subprocess.PIPE, text=True
    )
    while not half_way.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=100)

    assert (output / "precious").read_text() == "data"
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert len(list(output.parent.iterdir())) == 2, "what the killed run had written is still there"
    else:
        assert process.returncode == 128 + signum
        assert errors.splitlines()[-1] == (
            f"interrupted: {output} is as it was. Fix: run the same command to start again"
        )
        assert list(output.parent.iterdir()) == [output]

    assert tool(*command[:1], *command[1:])[0] == 0
    assert list(output.parent.iterdir()) == [output]
    assert (output / "metadata.json").exists()


def test_a_run_killed_between_the_two_renames_is_undone(tool: Tool, hf: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    output = tmp_path / "out" / "m"
    replaced = output.with_name(f".m.replaced-{socket.gethostname()}-{process.pid}")
    replaced.mkdir(parents=True)
    (replaced / "precious").write_text("data")
    status, _, errors = tool(TO_MEGATRON, "--hf-path", hf, "--output", output)
    assert status == 2
    assert "is not empty" in errors
    assert (output / "precious").read_text() == "data"
    running = output.with_name(f".m.incomplete-{socket.gethostname()}-{os.getppid()}")
    running.mkdir()
    assert tool(TO_MEGATRON, "--hf-path", hf, "--output", output, "--overwrite")[0] == 0
    assert sorted(output.parent.iterdir()) == [running, output], "another run's folder is left alone"
