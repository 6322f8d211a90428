"""Which engines run where, and which mistakes are found before anything starts."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gppo.config import ConfigError, ParallelConfig, RolloutConfig
from megatron_gppo.rollout import cpu_engine
from megatron_gppo.rollout.placement import EnginePlace, Node, engine_places, ranks_that_fit
from megatron_gppo.rollout.server import ManagedServer, server_command, server_environment
from tests.support.rollout import make_config

PUBLIC = {"host": "0.0.0.0", "api_key": "k"}


def places(nodes: int = 1, ranks: int = 2, **rollout: Any) -> list[EnginePlace]:
    return engine_places(make_config(Path("m"), Path("r"), **rollout).rollout, Node(0, nodes, ranks))


def on_cuda(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_one_engine_unless_said_otherwise() -> None:
    assert places(engine_tp=2, port=3000) == [EnginePlace(0, 0, 2, 3000)]
    assert places(mode="external", urls=["http://h:1"]) == []


def test_entries_count_and_ports_go_up() -> None:
    found = places(
        nodes=3, port=3000, server_args={"a": 1, "b": 2}, **PUBLIC,
        engines=[{"count": 2, "nodes": "all"}, {"nodes": [1], "tp": 2, "server_args": {"b": 3}}],
    )  # fmt: skip
    assert [(of.index, of.node, of.tp, of.port) for of in found] == [
        (0, 0, 1, 3000), (1, 0, 1, 3001), (2, 1, 1, 3000), (3, 1, 1, 3001), (4, 2, 1, 3000), (5, 2, 1, 3001), (6, 1, 2, 3002),
    ]  # fmt: skip
    assert found[0].server_args == {"a": 1, "b": 2}
    assert found[6].server_args == {"a": 1, "b": 3}


def test_cores_are_shared_out() -> None:
    found = places(engines=[{"count": 2, "tp": 2, "cores": list(range(8))}])
    assert [of.cores for of in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found[1].cores_of_ranks == [[4, 5], [6, 7]]


def test_cores_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine, "is_needed", lambda: True)
    environment = server_environment(EnginePlace(0, 0, 2, None, cores=[4, 5, 6, 7]))
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == "4,5|6,7"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_gpus_are_those_that_the_policy_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 8)
    found = places(engines=[{"count": 2, "tp": 2}, {"gpus": [7]}, {}])
    assert [of.gpus for of in found] == [[2, 3], [4, 5], [7], [6]]
    assert [of.gpus for of in places(engines=[{}, {"gpus": [2]}])] == [[3], [2]], "whatever the order"
    together = places(ranks=8, placement="colocated", engines=[{"count": 4, "tp": 2}])
    assert [of.gpus for of in together] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert places(ranks=8, server_args={"base-gpu-id": 4})[0].gpus == [], "in SGLang's own way"


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ([{"gpus": [1]}], r"gpus = \[1\], but \[1\] are the policy's, which takes the first 2"),
        ([{"gpus": [9]}], r"gpus = \[9\], but there are 8 on a node, counted from 0, and so no \[9\]"),
        ([{"count": 7}], "7 engines of tp 1 need 7 GPUs of a node, and the policy's ranks and other engines leave 6"),
        ([{"count": 6}, {}], "1 engines of tp 1 need 1 GPUs .* leave 0"),
    ],
)
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, engines: list[dict[str, Any]], message: str) -> None:
    on_cuda(monkeypatch, 8)
    with pytest.raises(ConfigError, match=message):
        places(engines=engines)


def test_a_node_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"rollout.engines.0.nodes = \[2\]: there are 2 nodes, counted from 0"):
        places(nodes=2, engines=[{"nodes": [2]}], **PUBLIC)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engines": [{"gpus": [0, 1, 2], "tp": 2}]}, r"engines.0.gpus = \[0, 1, 2\]: 1 engines of tp 2 need 2"),
        ({"engines": [{"gpus": [0]}, {"gpus": [0]}]}, r"engines.1.gpus = \[0\]: \[0\] are another entry's, too"),
        ({"engines": [{"count": 2, "cores": [1, 1]}]}, r"engines.0.cores = \[1, 1\] repeats one"),
        ({"engines": [{"count": 2, "cores": [0, 1, 2]}]}, r"cores = \[0, 1, 2\] cannot be shared out evenly over 2"),
        ({"engines": [{"cores": [0], "nodes": "all"}, {"cores": [0]}], **PUBLIC}, r"\[0\] are another entry's"),
        ({"engines": [{"nodes": [1]}]}, "host = 127.0.0.1 is one machine's. Fix: set rollout.host: 0.0.0.0 and"),
        ({"engines": [{}], "mode": "external", "urls": ["http://h:1"]}, "engines with mode = external"),
        ({"urls": ["http://h:1"]}, r"urls = \['http://h:1'\] with mode = managed. Fix: .* what to start beside them"),
        ({"oversample": 1.5}, "oversample = 1.5 is for dynamic sampling"),
    ],
)  # fmt: skip
def test_mistakes(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(Path("m"), Path("r"), **rollout)


def test_gpus_and_the_memory_saver_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 8)
    place = EnginePlace(3, 0, 2, None, gpus=[6, 7])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert server_environment(place)["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    assert server_environment(place)["CUDA_VISIBLE_DEVICES"] == "14,15"
    for placement in ("colocated", "disaggregated"):
        command = server_command(make_config(Path("m"), Path("r"), placement=placement), 1, place)
        assert ("--enable-memory-saver" in command) == (placement == "colocated")
        assert command[command.index("--random-seed") + 1] == "3", "engines do not draw alike"


def test_cores_that_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(tmp_path, tmp_path)
    before = os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match=r"cores = \[4000\]: Invalid argument; this process may use"):
        ManagedServer(config, tmp_path / "log", EnginePlace(0, 0, 1, None, cores=[4000]))
    assert os.sched_getaffinity(0) == before


def test_this_node_as_torchrun_describes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Node.here() == Node(0, 1, 0)
    for name, value in (("LOCAL_WORLD_SIZE", "8"), ("GROUP_RANK", "2"), ("WORLD_SIZE", "32")):
        monkeypatch.setenv(name, value)
    assert Node.here() == Node(2, 4, 8)


@pytest.mark.parametrize(
    ("gpus", "parallel", "rollout", "ranks"),
    [
        (8, {}, {}, 7),
        (8, {"tp": 2}, {"engine_tp": 2}, 6),
        (8, {"tp": 4}, {"engines": [{"count": 2}, {"gpus": [7]}]}, 4),
        (8, {"tp": 2}, {"placement": "colocated"}, 8),
        (8, {"cp": 2}, {"mode": "external", "urls": ["http://h:1"]}, 8),
        (1, {}, {}, 1),  # too few; that is said later
        (0, {"tp": 2, "cp": 2}, {}, 4),
    ],
)
def test_ranks_beside_the_engines(gpus: int, parallel: dict[str, int], rollout: dict[str, Any], ranks: int) -> None:
    config = make_config(Path("m"), Path("r"), **rollout)
    config = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
    assert ranks_that_fit(config, gpus) == ranks


def test_an_evaluation_leaves_no_gpu_to_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 1)
    assert [of.gpus for of in places(ranks=0)] == [[0]]


def test_defaults_are_one_managed_engine() -> None:
    rollout = RolloutConfig()
    assert (rollout.mode, rollout.engines, rollout.router, rollout.placement) == ("managed", [], False, "disaggregated")
