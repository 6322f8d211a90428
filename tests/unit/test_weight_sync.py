"""Buckets and their export in one process; the HTTP client and the joining of the group against a scripted peer.

That weights really arrive in SGLang is shown in tests/e2e/test_weight_sync.py.
"""

import base64
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.config import ConfigError, parse_config
from megatron_gppo.convert import Architecture, Parameter, parameters
from megatron_gppo.weight_sync import WeightSync, WeightSyncError, sync
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.distributed import DistributedTransport
from megatron_gppo.weight_sync.endpoint import EngineTensor, WeightEndpoint
from megatron_gppo.weight_sync.export import Exporter
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.routing import read_experts, unlike
from megatron_gppo.weight_sync.verify import check_reset, check_restored, compare_logprobs
from tests.support.policy_shards import SINGLE
from tests.support.synced_engines import GivenEngines

ARCHITECTURE = Architecture(
    name="Qwen2ForCausalLM",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=11,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    dtype=torch.float32,
)
TABLE = parameters(ARCHITECTURE)


def make_model(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random HF tensors by name, and the same as the shards of a single rank."""
    generator = torch.Generator().manual_seed(seed)
    hf = {
        name: torch.randn(shape, generator=generator)
        for parameter in TABLE
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True)
    }
    return hf, {parameter.name: parameter.from_hf(hf) for parameter in TABLE}


def copied(bucket: Bucket | None) -> Bucket:
    """As it is now: the exporter fills its memory again."""
    assert bucket is not None
    return replace(bucket, data=bucket.data.clone())


def bytes_of(parameter: Parameter, dtype: torch.dtype) -> int:
    return dtype.itemsize * torch.Size(parameter.shape).numel()


def test_a_bucket_is_its_tensors_one_behind_the_other() -> None:
    a, b = torch.randn(2, 3).bfloat16(), torch.randn(4).bfloat16()

    bucket = Bucket.flatten([("a", a), ("b", b.float())], torch.bfloat16, torch.empty(23, dtype=torch.uint8))

    assert bucket.data.dtype == torch.uint8
    assert bytes(bucket.data.tolist()) == bytes(torch.cat([a.flatten(), b]).view(torch.uint8).tolist())
    assert (bucket.names, bucket.shapes) == (["a", "b"], [(2, 3), (4,)])
    assert torch.equal(bucket.tensors()["a"], a)
    assert torch.equal(bucket.tensors()["b"], b)


@given(bucket_bytes=st.integers(1, 6000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=30)
def test_every_tensor_is_in_one_bucket_in_order_and_buckets_are_full(bucket_bytes: int, dtype: torch.dtype) -> None:
    hf, shards = make_model()
    exporter = Exporter(TABLE, shards, SINGLE, dtype, bucket_bytes)

    buckets = [copied(bucket) for bucket in exporter.export(shards)]

    assert (
        exporter.names
        == [name for bucket in buckets for name in bucket.names]
        == [n for p in TABLE for n in p.hf_names]
    )
    for bucket in buckets:
        for name, tensor in bucket.tensors().items():
            assert torch.equal(tensor, hf[name].to(dtype)), name
    sizes = [bucket.data.numel() for bucket in buckets]
    assert sizes == [exporter.bytes_of(number) for number in range(exporter.num_buckets)]
    assert sum(sizes) == exporter.num_bytes == sum(bytes_of(parameter, dtype) for parameter in TABLE)
    first_of = {parameter.hf_names[0]: parameter for parameter in TABLE}
    for bucket in buckets:
        held = [name for name in bucket.names if name in first_of]
        assert bucket.data.numel() <= bucket_bytes or len(held) == 1
    for bucket, following in itertools.pairwise(buckets):
        assert bucket.data.numel() + bytes_of(first_of[following.names[0]], dtype) > bucket_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards: shards.pop("output_layer.weight"), "output_layer.weight is on no rank"),
        (lambda shards: shards.update(nonsense=torch.zeros(1)), "rank 0 has an unknown parameter nonsense"),
        (
            lambda shards: shards.update({"decoder.final_layernorm.weight": torch.zeros(9)}),
            r"rank 0 has decoder.final_layernorm.weight of shape \(9,\), not \(8,\)",
        ),
    ],
)
def test_shards_that_do_not_fit_the_table(damage: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    _, shards = make_model()
    damage(shards)
    with pytest.raises(ValueError, match=message):
        Exporter(TABLE, shards, SINGLE, torch.float32, 1000)


def test_logprobs_within_tolerance_give_their_mean_difference() -> None:
    policy = torch.tensor([-1.0, -2.0])
    assert compare_logprobs("http://e", policy + 1e-5, policy, 1e-4) == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (torch.tensor([-1.0, -2.5]), r"http://e differ from the policy's by 0.25 nats .* 0.5, at token 2"),
        (torch.tensor([-1.0, float("nan")]), "by nan nats"),
        (torch.tensor([-1.0]), r"gave \(1,\) log-probs, the policy \(2,\)"),
    ],
)
def test_logprobs_that_differ(engine: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        compare_logprobs("http://e", engine, torch.tensor([-1.0, -2.0]), 1e-4)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_loopback_cannot_be_reached_from_another_machine(tmp_path: Path, host: str) -> None:
    config = parse_config(
        {
            "sync": {"host": host},
            "model": {"hf_path": str(tmp_path)},
            "run": {"dir": str(tmp_path)},
            "data": {"train": "unused"},
            "algorithm": {"preset": "paper"},
        }
    )
    with pytest.raises(
        ConfigError, match=rf"sync.host = {host} cannot be reached from .*10.0.0.5.* Fix: set sync.host"
    ):
        WeightSync(config, ARCHITECTURE, SINGLE, GivenEngines("http://10.0.0.5:30000")).sync(make_model()[1], 1)


def test_a_probe_without_an_engine_is_an_error_at_the_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: nobody listens
    config = parse_config(
        {
            "model": {"hf_path": str(tmp_path)},
            "run": {"dir": str(tmp_path)},
            "data": {"train": "unused"},
            "algorithm": {"preset": "paper"},
        }
    )
    engines = GivenEngines(nobody)
    weight_sync = WeightSync(config, ARCHITECTURE, SINGLE, engines)
    monkeypatch.setattr(sync, "push", lambda *arguments, **settings: None)

    def probe() -> float:
        weight_sync.sync(make_model()[1], 1)
        return weight_sync.verify_probe([1, 2], torch.tensor([-1.0]))

    with pytest.raises(WeightSyncError, match=r"no engine is left; phase 'probe': http://127\.0\.0\.1:9"):
        probe()
    with monkeypatch.context() as answered:
        answered.setattr(WeightEndpoint, "prompt_logprobs", lambda *arguments: torch.tensor([-1.0]))
        assert probe() == 0
    assert math.isnan(probe())
    assert list(engines.failures) == [nobody]


class Peer:
    """An HTTP server that answers each path with what it was told: (status, body), or an Event to wait for first."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any] | threading.Event] = {}
        self.calls: list[tuple[str, Any]] = []
        self.authorization: str | None = None
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                peer.calls.append((self.path, body))
                peer.authorization = self.headers["Authorization"]
                answer = peer.answers.get(self.path, (200, {"success": True}))
                if isinstance(answer, threading.Event):
                    answer.wait()
                    return
                status, content = answer
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    peers = [Peer(), Peer()]
    yield peers
    for peer in peers:
        for answer in peer.answers.values():
            if isinstance(answer, threading.Event):
                answer.set()
        peer.http.shutdown()
        peer.http.server_close()


@pytest.fixture
def peer(peers: list[Peer]) -> Peer:
    return peers[0]


def test_the_api_key_is_sent(peer: Peer) -> None:
    WeightEndpoint(peer.url, "secret", 10).pause("retract")
    assert peer.authorization == "Bearer secret"
    assert peer.calls == [("/pause_generation", {"mode": "retract"})]


def test_a_server_without_update_sessions(peer: Peer) -> None:
    peer.answers["/begin_weight_update"] = (404, {"detail": "Not Found"})
    endpoint = WeightEndpoint(peer.url, None, 10)
    endpoint.begin_update()
    endpoint.end_update()
    assert peer.paths == ["/begin_weight_update"]


def test_a_session_that_cannot_be_opened(peer: Peer) -> None:
    peer.answers["/begin_weight_update"] = (400, {"success": False, "message": "weights are frozen"})
    with pytest.raises(WeightSyncError, match=r"/begin_weight_update answered 400: weights are frozen"):
        WeightEndpoint(peer.url, None, 10).begin_update()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"success": False, "message": "no such tensor"}), "answered 400: no such tensor"),
        ((401, {"detail": "Unauthorized"}), "answered 401: Unauthorized"),
        ((500, b"Internal Server Error"), "answered 500: Internal Server Error"),
        ((200, b"<html>"), "did not answer with JSON"),
    ],
)
def test_what_an_engine_answers_is_in_the_error(peer: Peer, answer: Any, message: str) -> None:
    peer.answers["/weights_checker"] = answer
    with pytest.raises(WeightSyncError, match=f"{peer.url}/weights_checker {message}"):
        WeightEndpoint(peer.url, None, 10).checksums()


def test_an_engine_that_does_not_answer(peer: Peer) -> None:
    peer.answers["/weights_checker"] = threading.Event()
    with pytest.raises(WeightSyncError, match=f"{peer.url}/weights_checker did not answer within 0.2 s"):
        WeightEndpoint(peer.url, None, 0.2).checksums()


def test_an_engine_of_several_data_parallel_ranks_is_refused(peer: Peer) -> None:
    peer.answers["/server_info"] = (200, {"tp_size": 1, "pp_size": 1, "dp_size": 2})
    with pytest.raises(WeightSyncError, match=r"dp_size = 2.* Fix: start several servers"):
        WeightEndpoint(peer.url, None, 10).process()


def test_the_gpus_of_an_engine(peer: Peer) -> None:
    peer.answers["/server_info"] = (200, {"tp_size": 2, "base_gpu_id": 4, "gpu_id_step": 2})
    assert WeightEndpoint(peer.url, None, 10).process().gpus == (4, 6)
    assert WeightEndpoint(peer.url, None, 10, gpus=[2, 3]).process().gpus == (2, 3)


def join(*peers: Peer, timeout_s: float) -> Fleet:
    fleet = Fleet([WeightEndpoint(peer.url, None, timeout_s) for peer in peers])
    for peer in peers:
        peer.answers["/server_info"] = (200, {"tp_size": 1})
    processes = fleet.on_all("look", WeightEndpoint.process)
    DistributedTransport("127.0.0.1", timeout_s).prepare(fleet, processes, torch.device("cpu"))
    return fleet


def test_an_engine_that_refuses_the_group_ends_the_wait(peer: Peer) -> None:
    peer.answers["/init_weights_update_group"] = (400, {"message": "Failed to initialize custom process group"})
    with pytest.raises(WeightSyncError, match=f"phase 'join group': {peer.url}.* 400: Failed to initialize"):
        join(peer, timeout_s=10)
    _, body = peer.calls[-1]
    assert (body["rank_offset"], body["world_size"], body["backend"]) == (1, 2, "gloo")


def test_an_engine_that_never_joins_is_named(peer: Peer) -> None:
    peer.answers["/init_weights_update_group"] = threading.Event()
    with pytest.raises(WeightSyncError, match=f"phase 'join group'.*{peer.url}"):
        join(peer, timeout_s=1)


def named(**by_name: str) -> dict[EngineTensor, str]:
    return {EngineTensor(name, 0): checksum for name, checksum in by_name.items()}


def test_a_tensor_that_the_reset_leaves_alone_is_named() -> None:
    with pytest.raises(WeightSyncError, match=r"http://e did not reset embedding \(tp rank 0\)"):
        check_reset("http://e", named(embedding="1", norm="2"), named(embedding="1", norm="3"))


def test_tensors_that_are_not_restored_are_counted_and_named() -> None:
    before = named(**dict.fromkeys("abcdefghijklm", "1"))
    with pytest.raises(WeightSyncError, match=r"12 of 13 tensors .*: b \(tp rank 0\), .*k \(tp rank 0\) and 2 more\."):
        check_restored("http://e", before, named(a="1"))


def test_experts_are_compared_as_sets() -> None:
    policy = torch.tensor([[[0, 3], [1, 2]]])
    assert unlike(policy, torch.tensor([[[3, 0], [1, 2]]])) == 0
    assert unlike(policy, torch.tensor([[[0, 1], [1, 2]]])) == 0.25
    assert unlike(policy, torch.tensor([[[1, 2], [0, 3]]])) == 1


EXPERTS = torch.tensor([[[3, 0], [1, 2]], [[2, 1], [0, 1]], [[0, 1], [3, 2]]])  # 3 tokens, 2 layers, 2 of 4 experts


def generated(experts: torch.Tensor) -> dict[str, Any]:
    """As SGLang 0.5.23 answers: the experts of all tokens but the one that was generated."""
    return {"meta_info": {"routed_experts": base64.b64encode(experts.numpy().tobytes()).decode()}}


def test_the_experts_of_an_answer() -> None:
    read = read_experts(generated(EXPERTS.int()), EXPERTS.shape)
    assert read is not None
    assert torch.equal(read, EXPERTS)


def test_an_engine_that_does_not_say_which_experts() -> None:
    assert read_experts({"meta_info": {}}, EXPERTS.shape) is None


UNREADABLE = [
    (generated(EXPERTS.long()), "96 bytes"),
    (generated(EXPERTS.short()), "24 bytes"),
    (generated(EXPERTS[:2].int()), "32 bytes"),
    (generated(torch.zeros(47, dtype=torch.uint8)), "47 bytes"),
    (generated(torch.zeros(0, dtype=torch.int32)), "0 bytes"),
    ({"meta_info": {"routed_experts": "no base64!"}}, "'no base64!'"),
    ({"meta_info": {"routed_experts": EXPERTS.tolist()}}, r"\[\[\[3, 0\], "),
    ({"text": "a"}, "{'text': 'a'}"),
    ([], r"\[\]"),
]


@pytest.mark.parametrize(("answer", "came"), UNREADABLE)
def test_an_answer_that_is_not_the_experts(answer: Any, came: str) -> None:
    expected = "expected 48 bytes in base64, int32 of 3 tokens x 2 layers x 2 experts"
    with pytest.raises(ValueError, match=f"{expected}; came {came}"):
        read_experts(answer, EXPERTS.shape)


@pytest.fixture
def synced_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[WeightSync, GivenEngines]]:
    """A sync whose engines, at these URLs, count as having the weights."""
    monkeypatch.setattr(sync, "push", lambda *arguments, **settings: None)

    def make(*urls: str) -> tuple[WeightSync, GivenEngines]:
        config = parse_config(
            {
                "model": {"hf_path": str(tmp_path)},
                "run": {"dir": str(tmp_path)},
                "data": {"train": "unused"},
                "algorithm": {"preset": "paper"},
            }
        )
        engines = GivenEngines(*urls)
        weight_sync = WeightSync(config, ARCHITECTURE, SINGLE, engines)
        weight_sync.sync(make_model()[1], 1)
        return weight_sync, engines

    return make


def test_the_policys_and_an_engines_experts_are_compared(
    synced_with: Callable[..., tuple[WeightSync, GivenEngines]], peer: Peer
) -> None:
    peer.answers["/generate"] = (200, generated(EXPERTS.int()))
    policy = EXPERTS.clone()
    policy[0, 0] = torch.tensor([1, 2])
    weight_sync, _ = synced_with(peer.url)
    assert weight_sync.routing_difference([5, 6, 7, 8], policy) == pytest.approx(2 / 12)
    ((_, body),) = peer.calls
    assert body["input_ids"] == [5, 6, 7]
    assert body["return_routed_experts"]


@pytest.mark.parametrize(("answer", "came"), UNREADABLE)
def test_unreadable_experts_lose_no_engine(
    synced_with: Callable[..., tuple[WeightSync, GivenEngines]],
    peer: Peer,
    capsys: pytest.CaptureFixture[str],
    answer: Any,
    came: str,
) -> None:
    peer.answers["/generate"] = (200, answer)
    weight_sync, engines = synced_with(peer.url)
    for _ in range(2):
        assert weight_sync.routing_difference([5, 6, 7], EXPERTS) is None
    assert engines.failures == {}
    warnings = capsys.readouterr().err
    assert warnings.count("warning: ") == 1
    assert re.search(f"warning: engine/routing_difference.* {peer.url}.*expected 48 bytes.*; came {came}", warnings)


def test_an_engine_whose_experts_are_unreadable_does_not_hide_the_others(
    synced_with: Callable[..., tuple[WeightSync, GivenEngines]], peers: list[Peer]
) -> None:
    unreadable, readable = peers
    unreadable.answers["/generate"] = (200, generated(EXPERTS.short()))
    readable.answers["/generate"] = (200, generated(EXPERTS.flip(0).int()))
    weight_sync, _ = synced_with(unreadable.url, readable.url)
    assert weight_sync.routing_difference([5, 6, 7], EXPERTS) == unlike(EXPERTS, EXPERTS.flip(0))


def test_an_engine_that_refuses_to_say_which_experts_is_lost(
    synced_with: Callable[..., tuple[WeightSync, GivenEngines]], peers: list[Peer]
) -> None:
    refusing, answering = peers
    refusing.answers["/generate"] = (500, b"Internal Server Error")
    answering.answers["/generate"] = (200, generated(EXPERTS.int()))
    weight_sync, engines = synced_with(refusing.url, answering.url)
    assert weight_sync.routing_difference([5, 6, 7], EXPERTS) == 0
    assert list(engines.failures) == [refusing.url]
