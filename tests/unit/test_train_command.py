"""Mistakes that the train command finds before anything is started: one line, exit status 2, nothing written."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gppo import train
from tests.support.tiny import make_tiny_model
from tests.support.training import write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def run(config: Path, *arguments: str) -> int:
    return train.main(["--config", str(config), *arguments])


def test_dry_run_prints_the_plan_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model)
    before = sorted(tmp_path.iterdir())
    assert run(config, "--dry-run", "--world-size", "8", "parallel.tp=2", "parallel.pp=2") == 0
    printed = capsys.readouterr().out
    assert "8 = dp 2 x tp 2 x pp 2" in printed
    assert "4 optimizer steps" in printed
    assert "builds       Megatron's model of every stage, on the meta device as one of 8 ranks" in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=3", "tp = 3"),
        ("parallel.pp=8", "pp = 8 is larger than num_hidden_layers = 4"),
        ("model.hf_path=/nowhere", "/nowhere/config.json: No such file or directory"),
        ("train.stepps=3", "train.stepps = 3: unknown key; did you mean steps?"),
        ("train.prompts_per_update=3", "is not a multiple of train.prompts_per_update = 3"),
        ("rollout.temperature=0", "rollout.temperature = 0"),
        ("run.dir=null", "run.dir"),
        ("rollout", "is not of the form section.key=value"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    config = write_config(tmp_path, model)
    assert run(config, "--dry-run", "--world-size", "24", override) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_without_torchrun_it_says_how_to_start(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(write_config(tmp_path, model)) == 2
    assert "torchrun --nproc-per-node N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.dir={}/in_the_way/run", "run.dir = {}/in_the_way/run: Not a directory"),
        ("data.train={}/missing.jsonl", "{}/missing.jsonl"),
        ("rollout.port={port}", "rollout.port = {port}"),
        ("reward.function=nowhere:judge", "nowhere"),
    ],
)
def test_mistakes_in_the_surroundings_end_the_run_in_a_line(
    model: Path, tmp_path: Path, setting: str, message: str
) -> None:
    """Through the command on one node, which starts torchrun."""
    (tmp_path / "in_the_way").write_text("")
    config = write_config(tmp_path, model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        override = setting.format(tmp_path, port=port)
        command = [sys.executable, "-m", "megatron_gppo.cli", "train", "--nproc-per-node", "1", "--config", str(config)]
        done = subprocess.run([*command, override], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert message.format(tmp_path, port=port) in done.stderr
    assert "torch/distributed" not in done.stderr, "torchrun repeats it"
    assert done.stderr.count("error:") == 1
