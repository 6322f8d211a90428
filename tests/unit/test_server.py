"""The command, environment and port of a managed server, decided before anything starts."""

import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_gppo.config import ConfigError
from megatron_gppo.rollout import cpu_engine
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.launch import launched_engines
from megatron_gppo.rollout.placement import EnginePlace, only_place
from megatron_gppo.rollout.server import (
    ManagedServer,
    server_command,
    server_environment,
    wait_healthy,
)
from tests.support.rollout import make_config

ON_CPU = [False, True]


def command(monkeypatch: pytest.MonkeyPatch, on_cpu: bool, **rollout: Any) -> list[str]:
    monkeypatch.setattr(cpu_engine, "is_needed", lambda: on_cpu)
    config = make_config(Path("/models/qwen"), Path("run"), **rollout)
    return server_command(config, 30000, only_place(config.rollout))


def value_of(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_command(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    arguments = command(
        monkeypatch, on_cpu, engine_tp=2, engine_dtype="bf16", api_key="k",
        server_args={"mem_fraction_static": 0.8, "enable-memory-saver": True, "disable_radix_cache": False},
    )  # fmt: skip
    assert arguments[1:3] == ["-m", "sglang.launch_server"]
    assert value_of(arguments, "--model-path") == "/models/qwen"
    assert value_of(arguments, "--dtype") == "bfloat16"
    assert value_of(arguments, "--tp-size") == "2"
    assert value_of(arguments, "--port") == "30000"
    assert value_of(arguments, "--api-key") == "k"
    assert value_of(arguments, "--weight-version") == "0"
    assert value_of(arguments, "--mem-fraction-static") == "0.8"
    assert arguments[-1] == "--enable-memory-saver"
    assert "--disable-radix-cache" not in arguments
    assert ("--device" in arguments) == ("--attention-backend" in arguments) == on_cpu


def test_the_dtype_is_the_policys_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert value_of(command(monkeypatch, False), "--dtype") == "float32"


def test_server_args_replace_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(monkeypatch, True, server_args={"max_total_tokens": 99})
    assert arguments.count("--max-total-tokens") == 1
    assert value_of(arguments, "--max-total-tokens") == "99"


def test_server_args_with_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(monkeypatch, False, server_args={"cuda_graph_bs": [1, 2, 4]})
    assert arguments[-4:] == ["--cuda-graph-bs", "1", "2", "4"]


@pytest.mark.parametrize("name", ["port", "tp-size", "tp", "model_path"])
def test_server_args_cannot_replace_fields(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.server_args = .*{name.replace('-', '_')} is set by fields"):
        command(monkeypatch, False, server_args={name: 1})


@pytest.mark.parametrize("on_cpu", ON_CPU)
def test_environment(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(cpu_engine, "is_needed", lambda: on_cpu)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "ROLE_NAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = server_environment(EnginePlace(0, 0, 2, None))
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "ROLE_NAME"} & set(
        environment
    )
    assert environment["NCCL_DEBUG"] == "WARN"
    if on_cpu:
        assert environment["PYTHONPATH"] == f"{cpu_engine.STUBS}:/mine"
        assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
        assert environment["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    else:
        assert environment["PYTHONPATH"] == "/mine"
        assert "SGLANG_USE_CPU_ENGINE" not in environment


def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = make_config(model_folder(tmp_path), tmp_path, port=port)
        with pytest.raises(ConfigError, match=rf"rollout.port = {port}.*[Aa]ddress already in use.*Fix"):
            ManagedServer(config, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_host_that_is_not_ours_is_an_error(tmp_path: Path) -> None:
    config = make_config(model_folder(tmp_path), tmp_path, host="192.0.2.1", api_key="k")
    with pytest.raises(ConfigError, match=r"rollout.host = 192.0.2.1.*address of this machine"):
        ManagedServer(config, tmp_path / "log")


def test_no_model_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.hf_path = .*/none has no config.json"):
        ManagedServer(make_config(tmp_path / "none", tmp_path), tmp_path / "log")


def test_external_servers_must_answer(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, mode="external", urls=["http://127.0.0.1:1"], start_timeout_s=0.1)
    with (
        pytest.raises(EngineError, match=r"http://127.0.0.1:1 was not healthy within rollout.start_timeout_s = 0.1 s"),
        launched_engines(config) as engines,
    ):
        engines.wait_ready()


def test_a_url_without_a_scheme_is_an_error() -> None:
    with pytest.raises(ConfigError, match="write it as http://HOST:PORT"):
        wait_healthy("127.0.0.1", None, 0.1)
