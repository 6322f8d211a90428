"""Weights pushed into a real SGLang server are what it then computes with, and every failure says where it happened."""

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.config import parse_config
from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.metrics import Phases
from megatron_gppo.rollout.hosts import ExternalHost
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync import WeightSync, WeightSyncError, sync
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.disk import DiskTransport
from megatron_gppo.weight_sync.distributed import DistributedTransport
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from megatron_gppo.weight_sync.export import Exporter
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.push import push
from megatron_gppo.weight_sync.sample import RollingSample
from megatron_gppo.weight_sync.shared_memory import SharedMemoryTransport
from megatron_gppo.weight_sync.transport import Transport
from megatron_gppo.weight_sync.verify import check_restored
from tests.support.policy_shards import SINGLE, cut, hf_tensors
from tests.support.rollout import make_config, processes_below, wait_busy
from tests.support.synced_engines import GivenEngines
from tests.support.tiny import make_tiny_model

PROBE = [5, 14, 6, 13, 8, 1, 20, 33, 2, 40, 7, 7]
TIMEOUT_S = 120.0
BUCKET_BYTES = 60_000
TRANSPORTS = ["distributed", "tensor", "disk"]

Tensors = dict[str, torch.Tensor]


def make_sync(model: Path, engines: GivenEngines, run_dir: Path, **sync: Any) -> WeightSync:
    config = parse_config(
        {
            "model": {"hf_path": str(model), "dtype": "fp32"},
            "run": {"dir": str(run_dir)},
            "data": {"train": "unused"},
            "algorithm": {"preset": "paper"},
            "rollout": {"mode": "external", "urls": engines.urls},
            "sync": {"timeout_s": TIMEOUT_S, **sync},
        }
    )
    return WeightSync(config, Architecture.from_hf(model), SINGLE, engines)


def make_transport(name: str, folder: Path, model: Path) -> Transport:
    if name == "distributed":
        return DistributedTransport("127.0.0.1", TIMEOUT_S)
    return SharedMemoryTransport(SINGLE) if name == "tensor" else DiskTransport(folder, model)


def shards_of(folder: Path) -> Tensors:
    return cut(Architecture.from_hf(folder), hf_tensors(folder), SINGLE)


def buckets_of(folder: Path) -> list[Bucket]:
    """More than five of them."""
    shards = shards_of(folder)
    exporter = Exporter(parameters(Architecture.from_hf(folder)), shards, SINGLE, torch.float32, BUCKET_BYTES)
    return [replace(bucket, data=bucket.data.clone()) for bucket in exporter.export(shards) if bucket is not None]


def push_to(
    url: str, transport: Transport, buckets: Sequence[Bucket], version: int, sample: RollingSample | None = None
) -> None:
    push(
        Fleet([WeightEndpoint(url, None, TIMEOUT_S)]),
        transport,
        iter(buckets),
        len(buckets),
        sum(bucket.data.nbytes for bucket in buckets),
        version=str(version),
        pause="abort",
        device=torch.device("cpu"),
        sample=sample or RollingSample([name for bucket in buckets for name in bucket.names]),
        phases=Phases(),
    )


def hf_logprobs(folder: Path) -> torch.Tensor:
    """[L-1] of PROBE."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([PROBE])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tiny_model's architecture, with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("new_model") / "tiny", seed=1)


@pytest.fixture
def engine(server: ManagedServer, tiny_model: Path, tmp_path: Path) -> Iterator[WeightEndpoint]:
    """The session's server, which gets its weights back at the end."""
    yield WeightEndpoint(server.url, None, TIMEOUT_S)
    weight_sync = make_sync(tiny_model, GivenEngines(server.url), tmp_path)
    weight_sync.sync(shards_of(tiny_model), 0)
    weight_sync.close()


@pytest.fixture
def weight_sync(engine: WeightEndpoint, tiny_model: Path, tmp_path: Path) -> Iterator[WeightSync]:
    weight_sync = make_sync(tiny_model, GivenEngines(engine.url), tmp_path)
    yield weight_sync
    weight_sync.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_engine_computes_with_the_weights_it_was_sent(
    transport: str, engine: WeightEndpoint, tiny_model: Path, new_model: Path, tmp_path: Path
) -> None:
    old, new = hf_logprobs(tiny_model), hf_logprobs(new_model)
    assert (engine.prompt_logprobs(PROBE) - old).abs().max() < 1e-5
    assert (old - new).abs().max() > 0.1
    engines = GivenEngines(engine.url)
    weight_sync = make_sync(tiny_model, engines, tmp_path, transport=transport)

    stats = weight_sync.sync(shards_of(new_model), 7)

    assert stats.num_bytes == sum(tensor.nbytes for tensor in hf_tensors(new_model).values())
    assert engines.versions == {engine.url: 7}
    assert engine.weight_version() == "7"
    assert (engine.prompt_logprobs(PROBE) - new).abs().max() < 1e-5
    assert weight_sync.verify_probe(PROBE, new) < 1e-5
    with pytest.raises(WeightSyncError, match=f"probe: the log-probs of {engine.url} differ"):
        weight_sync.verify_probe(PROBE, old)
    weight_sync.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_buckets_load_as_one_does(
    transport: str, engine: WeightEndpoint, tiny_model: Path, new_model: Path, tmp_path: Path
) -> None:
    buckets = buckets_of(new_model)
    assert len(buckets) > 5
    connection = make_transport(transport, tmp_path / "weights", tiny_model)
    push_to(engine.url, connection, buckets_of(tiny_model), 8)
    push_to(engine.url, connection, buckets, 9)
    connection.close()
    assert engine.weight_version() == "9"
    assert (engine.prompt_logprobs(PROBE) - hf_logprobs(new_model)).abs().max() < 1e-5
    if transport == "disk":
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_9"]


def test_the_start_is_verified_tensor_by_tensor(weight_sync: WeightSync, tiny_model: Path, new_model: Path) -> None:
    weight_sync.verify_start(shards_of(tiny_model), 0, engines_hold_policy=True)
    # A resumed run: the engine holds what it loaded, the policy something else.
    weight_sync.verify_start(shards_of(new_model), 3, engines_hold_policy=False)
    assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 1e-5


def test_a_wrong_tensor_is_named_before_the_first_step(
    weight_sync: WeightSync, engine: WeightEndpoint, tiny_model: Path
) -> None:
    shards = shards_of(tiny_model)
    shards["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] += 1e-3
    with pytest.raises(WeightSyncError, match="phase 'verify'") as error:
        weight_sync.verify_start(shards, 0, engines_hold_policy=True)
    assert f"{engine.url}: 1 of " in str(error.value)
    assert "model.layers.1.mlp.down_proj.weight" in str(error.value)


def test_a_tensor_under_a_wrong_name_is_found_missing(engine: WeightEndpoint, tiny_model: Path) -> None:
    """SGLang ignores a name that it does not know: only the verification sees it."""
    buckets = buckets_of(tiny_model)
    buckets[-1].names[buckets[-1].names.index("lm_head.weight")] = "head.weight"
    connection = DistributedTransport("127.0.0.1", TIMEOUT_S)
    before = engine.checksums()
    engine.reset_tensors()
    with pytest.raises(WeightSyncError, match=r"check sample': .*: 1 tensors .*: head.weight \(not there\)"):
        push_to(engine.url, connection, buckets, 0)  # what is in no layer has its turn first
    connection.close()
    with pytest.raises(WeightSyncError, match=r"1 of .* lm_head.weight \(tp rank 0\)\."):
        check_restored(engine.url, before, engine.checksums())


class Damaging(DistributedTransport):
    """Sends something else in place of one element, or a tensor under a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", TIMEOUT_S)
        self.damaged: str | None = None
        self.renamed: str | None = None

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        bucket = replace(bucket, names=["nobody" if name == self.renamed else name for name in bucket.names])
        if self.damaged in bucket.names:
            bucket = replace(bucket, data=bucket.data.clone())
            bucket.tensors()[self.damaged].view(-1)[3] += 1e-3
        super().send(fleet, bucket, phase, version)


@pytest.mark.parametrize(
    ("damaged", "found"),
    [
        ("model.layers.2.mlp.down_proj.weight", r"model.layers.2.mlp.down_proj.weight \(not what was sent\)"),
        (
            "model.layers.2.self_attn.k_proj.weight",
            r"model.layers.2.self_attn.qkv_proj.weight \(changed, though the policy's did not\)",
        ),
    ],
)
def test_a_tensor_that_is_damaged_on_its_way_is_found_at_its_turn(
    damaged: str, found: str, engine: WeightEndpoint, new_model: Path
) -> None:
    buckets = buckets_of(new_model)
    sample = RollingSample([name for bucket in buckets for name in bucket.names])
    connection = Damaging()
    for version in range(8):  # what is in no layer, layers 0 to 3; what is in none, layers 0 and 1
        push_to(engine.url, connection, buckets, version, sample)
    connection.damaged = damaged
    with pytest.raises(WeightSyncError, match=f"{engine.url}: 1 tensors .*: {found}"):
        push_to(engine.url, connection, buckets, 8, sample)
    connection.close()


def test_all_tensors_are_verified_on_demand(
    engine: WeightEndpoint, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Damaging()
    monkeypatch.setattr(sync, "_make_transport", lambda *arguments: connection)
    weight_sync = make_sync(tiny_model, GivenEngines(engine.url), tmp_path, verify_all_every=3)
    weight_sync.sync(shards_of(tiny_model), 1)
    connection.renamed = "lm_head.weight"
    weight_sync.sync(shards_of(tiny_model), 2)  # layer 0 has its turn
    with pytest.raises(WeightSyncError, match=r"phase 'verify': .*: 1 of .*: lm_head.weight \(tp rank 0\)"):
        weight_sync.sync(shards_of(tiny_model), 3)
    weight_sync.close()


def test_a_tensor_of_a_wrong_shape(engine: WeightEndpoint, tiny_model: Path) -> None:
    buckets = buckets_of(tiny_model)
    wrong = [("model.norm.weight", torch.zeros(3))]
    buckets[1] = Bucket.flatten(wrong, torch.float32, torch.empty(12, dtype=torch.uint8))
    connection = DistributedTransport("127.0.0.1", TIMEOUT_S)
    with pytest.raises(
        WeightSyncError, match=f"phase 'load bucket 2 of {len(buckets)}': {engine.url}.* 400: "
    ) as error:
        push_to(engine.url, connection, buckets, 1)
    assert "3]" in str(error.value)
    connection.close()


def test_a_session_that_a_killed_trainer_left_open(
    weight_sync: WeightSync, engine: WeightEndpoint, new_model: Path, tmp_path: Path
) -> None:
    engine.pause("abort")
    engine.begin_update()
    host = ExternalHost(make_config(new_model, tmp_path, start_timeout_s=30).rollout, engine.url)
    assert host.wait_ready() == engine.url
    weight_sync.sync(shards_of(new_model), 2)
    assert engine.weight_version() == "2"
    assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 1e-5


def start_generation(url: str, tokens: int) -> Callable[[], dict[str, Any]]:
    """A long request in a thread; its meta_info when it has ended."""
    answers: list[dict[str, Any]] = []
    body = {"input_ids": PROBE, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}

    def run() -> None:
        request = urllib.request.Request(
            f"{url}/generate", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answers.append(json.load(answer)["meta_info"])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> dict[str, Any]:
        thread.join(TIMEOUT_S)
        return answers[0]

    return result


@pytest.mark.parametrize(
    ("pause", "transport"),
    [
        ("abort", "distributed"),
        ("retract", "distributed"),
        ("in_place", "distributed"),
        ("in_place", "tensor"),
        ("retract", "disk"),
    ],
)
def test_what_becomes_of_a_request_in_flight(
    pause: str, transport: str, engine: WeightEndpoint, tiny_model: Path, new_model: Path, tmp_path: Path
) -> None:
    weight_sync = make_sync(tiny_model, GivenEngines(engine.url), tmp_path, transport=transport, pause=pause)
    weight_sync.sync(shards_of(tiny_model), 1)
    meta_info = start_generation(engine.url, 400)
    wait_busy(engine.url)

    weight_sync.sync(shards_of(new_model), 2)

    ended = meta_info()
    versions = [span["version"] for span in ended["weight_versions"]]
    assert ended["finish_reason"]["type"] == ("abort" if pause == "abort" else "length")
    assert versions == (["1"] if pause == "abort" else ["1", "2"])
    assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 1e-5
    weight_sync.close()


class Killing(dict[str, torch.Tensor]):
    """Shards that kill a server when the export comes to the last of them."""

    def __init__(self, shards: Tensors, server: ManagedServer) -> None:
        super().__init__(shards)
        self._server = server

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "output_layer.weight":
            for process in processes_below(self._server.guard_pid)[1:]:
                os.kill(process, signal.SIGKILL)
        return super().__getitem__(name)


def test_several_engines_and_one_that_dies(
    engine: WeightEndpoint, tiny_model: Path, new_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "Exporter", lambda *arguments: Exporter(*arguments[:-1], BUCKET_BYTES))
    with ManagedServer(make_config(tiny_model, tmp_path, engine_tp=2), tmp_path / "sglang.log") as second:
        second.wait_ready()
        engines = GivenEngines(second.url)
        weight_sync = make_sync(tiny_model, engines, tmp_path)
        wrong = shards_of(tiny_model)
        wrong["decoder.layers.1.mlp.linear_fc2.weight"][3, -1] += 1e-3  # the last columns are on the second TP rank
        with pytest.raises(WeightSyncError, match=r"1 of .* model.layers.1.mlp.down_proj.weight \(tp rank 1\)"):
            weight_sync.verify_start(wrong, 0, engines_hold_policy=True)

        # One TP rank before two; the group is made anew. It gets its broadcasts from the trainer, and not by way of the other.
        engines.urls.insert(0, engine.url)
        weight_sync.verify_start(shards_of(tiny_model), 0, engines_hold_policy=False)
        for version, (transport, model) in enumerate(
            zip(TRANSPORTS, [new_model, tiny_model, new_model], strict=True), 1
        ):
            other = make_sync(tiny_model, engines, tmp_path, transport=transport)
            other.sync(shards_of(model), version)
            assert other.verify_probe(PROBE, hf_logprobs(model)) < 1e-5
            other.close()
        assert engines.versions == {second.url: 3, engine.url: 3}

        weight_sync.sync(Killing(shards_of(tiny_model), second), 4)

        assert list(engines.failures) == [second.url]
        assert "bucket" in engines.failures[second.url]
        assert engines.versions == {second.url: 3, engine.url: 4}
        assert weight_sync.verify_probe(PROBE, hf_logprobs(tiny_model)) < 1e-5
        engines.urls.remove(second.url)
        weight_sync.sync(shards_of(new_model), 5)
        assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 1e-5
        engines.urls = [second.url]
        with pytest.raises(WeightSyncError, match=f"no engine is left; phase 'read the engine's layout': {second.url}"):
            make_sync(tiny_model, engines, tmp_path).sync(shards_of(new_model), 6)
        engines.coming_up = engine.url
        weight_sync.sync(shards_of(tiny_model), 6)
        assert engines.versions[engine.url] == 6
        assert weight_sync.verify_probe(PROBE, hf_logprobs(tiny_model)) < 1e-5
        weight_sync.close()
