"""What transports write and send, and what a fleet does with engines that fail. Real engines: tests/e2e/test_weight_sync.py."""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from megatron_gppo.config import ConfigError, SyncConfig, parse_config
from megatron_gppo.convert.hf_checkpoint import HfCheckpoint
from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync import WeightSyncError, distributed
from megatron_gppo.weight_sync.addresses import check_host, is_on_this_machine
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.disk import DiskTransport
from megatron_gppo.weight_sync.distributed import DistributedTransport
from megatron_gppo.weight_sync.endpoint import Checksums, EngineProcess, EngineTensor, NoAnswerError, WeightEndpoint
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.push import push
from megatron_gppo.weight_sync.sample import RollingSample
from megatron_gppo.weight_sync.shared_memory import SharedMemoryTransport, serialized
from megatron_gppo.weight_sync.transport import SendAgainError
from tests.support.policy_shards import SINGLE
from tests.support.tiny import make_tiny_model

CPU = torch.device("cpu")
NUM_BYTES = 38  # of make_buckets()


class Endpoint(WeightEndpoint):
    """Says yes to everything, or fails."""

    def __init__(self, url: str, failure: str | None = None) -> None:
        super().__init__(url, None, 1)
        self.failure = failure
        self.calls: list[tuple[str, Any]] = []

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        self.calls.append((path, body))
        if self.failure is not None:
            raise WeightSyncError(f"{self.url}{path} {self.failure}")
        return b"{}"


def make_buckets() -> list[Bucket]:
    tensors = [("a", torch.randn(2, 3)), ("b", torch.randn(5)), ("c", torch.randn(4, 2))]
    return [
        Bucket.flatten(part, torch.bfloat16, torch.empty(64, dtype=torch.uint8)) for part in (tensors[:2], tensors[2:])
    ]


def test_an_engine_that_fails_leaves_the_fleet_and_the_last_one_is_an_error() -> None:
    good, bad = Endpoint("http://good"), Endpoint("http://bad", "broke")
    fleet = Fleet([bad, good])

    assert list(fleet.on_all("pause", lambda endpoint: endpoint.pause("abort") or endpoint.url).values()) == [
        "http://good"
    ]

    assert fleet.endpoints == [good]
    assert fleet.failed == {"http://bad": "phase 'pause': http://bad/pause_generation broke"}
    good.failure = "broke, too"
    with pytest.raises(
        WeightSyncError, match=r"no engine is left; phase 'pause': http://bad.* broke; phase 'resume': http://good"
    ):
        fleet.on_all("resume", WeightEndpoint.resume)


def test_no_engine_at_all_and_failures_of_the_attempt_before() -> None:
    with pytest.raises(WeightSyncError, match="no engine is left; there was none"):
        Fleet([])
    with pytest.raises(WeightSyncError, match="no engine is left; phase 'x': broke"):
        Fleet([], {"http://e": "phase 'x': broke"})


def broken_up(calls: dict[WeightEndpoint, Future[None]]) -> dict[str, str]:
    """Who is blamed when one of the group's calls has failed."""
    fleet = Fleet([*calls, Endpoint("http://other")])
    with pytest.raises(SendAgainError):
        DistributedTransport("127.0.0.1", 1)._break_up(fleet, "broadcast", calls, "")
    return fleet.failed


@pytest.mark.parametrize(
    ("first", "later", "blamed"),
    [
        pytest.param(
            WeightSyncError("http://first answered 400: Connection closed by peer"),
            NoAnswerError("http://later failed: Connection reset by peer"),
            "http://later",
            id="one that dies, though another answers first",
        ),
        pytest.param(
            WeightSyncError("http://first answered 400: unknown tensor"),
            WeightSyncError("http://later answered 400: Connection closed by peer"),
            "http://first",
            id="the first to refuse, where none dies",
        ),
    ],
)
def test_who_is_to_blame_for_a_broken_group(first: WeightSyncError, later: WeightSyncError, blamed: str) -> None:
    calls: dict[WeightEndpoint, Future[None]] = {Endpoint(f"http://{name}"): Future() for name in ("first", "later")}
    first_call, later_call = calls.values()
    first_call.set_exception(first)
    answer = threading.Timer(0.2, lambda: later_call.set_exception(later))
    answer.start()
    cause = first if blamed == "http://first" else later
    assert broken_up(calls) == {blamed: f"phase 'broadcast': {cause}"}
    answer.join()


def test_who_is_at_work_on_a_bucket_that_another_refuses_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE_S", 0.2)
    calls: dict[WeightEndpoint, Future[None]] = {Endpoint(f"http://{name}"): Future() for name in ("refusing", "slow")}
    refusing, _ = calls.values()
    refusing.set_exception(WeightSyncError("http://refusing answered 400: unknown tensor"))
    fleet = Fleet(list(calls))
    with pytest.raises(SendAgainError):
        DistributedTransport("127.0.0.1", 1)._break_up(fleet, "load", calls, all_sent=True)
    assert list(fleet.failed) == ["http://refusing"]


class Talking(Endpoint):
    """An engine that holds whatever it is said to hold."""

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        answers = {"/server_info": {"tp_size": 1}, "/model_info": {"weight_version": "3"}}
        return json.dumps(answers.get(path, {})).encode()

    def checksums(self, skip: Sequence[str] = ()) -> Checksums:
        return {EngineTensor(name, 0): name for name in "abc" if name not in skip}


class Recording:
    """A transport that notes what it is told; see Transport."""

    in_session = False

    def __init__(self) -> None:
        self.events: list[str] = []
        self.members: list[str] = []

    def prepare(self, fleet: Fleet, processes: Any, device: torch.device) -> None:
        self.members = [endpoint.url for endpoint in fleet.endpoints]

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        self.events.append(f"send {''.join(bucket.names)}")

    def wait(self, fleet: Fleet, phases: Phases) -> None:
        self.events.append("wait")


class Unpausable(Talking):
    def pause(self, mode: str) -> None:
        raise NoAnswerError(f"{self.url} died")


def push_recorded(num_bytes: int, *engines: WeightEndpoint) -> Recording:
    transport, buckets = Recording(), make_buckets()

    def exported() -> Iterator[Bucket]:
        for bucket in buckets:
            transport.events.append(f"export {''.join(bucket.names)}")
            yield bucket

    push(
        Fleet(engines or [Talking("http://e")]),
        transport,
        exported(),
        len(buckets),
        num_bytes,
        version="3",
        pause="abort",
        device=CPU,
        sample=RollingSample(list("abc")),
        phases=Phases(),
    )
    return transport


def test_the_next_bucket_is_exported_while_one_is_sent() -> None:
    assert push_recorded(NUM_BYTES).events == ["export ab", "wait", "send ab", "export c", "wait", "send c", "wait"]


def test_an_engine_lost_before_the_first_bucket_is_no_member_of_what_sends_it() -> None:
    assert push_recorded(NUM_BYTES, Unpausable("http://dying"), Talking("http://e")).members == ["http://e"]


def test_bytes_that_are_missing_are_found() -> None:
    with pytest.raises(WeightSyncError, match="38 bytes were sent, not 40"):
        push_recorded(40)


def test_a_version_on_disk_is_a_whole_hf_folder_under_its_name(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    for older in ("version_3", "outdated_version_2"):
        (tmp_path / "weights" / older).mkdir(parents=True)
    transport = DiskTransport(tmp_path / "weights", model)
    engine = Endpoint("http://e")
    fleet = Fleet([engine])
    transport.prepare(fleet, {}, CPU)
    buckets = make_buckets()
    for number, bucket in enumerate(buckets):
        transport.wait(fleet, Phases())
        assert engine.calls == []
        transport.send(fleet, bucket, "bucket", "4" if number == 1 else None)
    transport.wait(fleet, Phases())
    transport.close()

    folder = tmp_path / "weights" / "version_4"
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
    [(path, body)] = engine.calls
    assert (path, body["model_path"], body["weight_version"]) == ("/update_weights_from_disk", str(folder), "4")
    expected = {name: tensor for bucket in buckets for name, tensor in bucket.tensors().items()}
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert written.keys() == expected.keys()
    for name in expected:
        assert torch.equal(written[name], expected[name])
        assert torch.equal(HfCheckpoint(folder).read(name), expected[name])  # by way of the index


def test_a_disk_that_is_full_ends_the_run_and_no_engine(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    fleet = Fleet([Endpoint("http://e")])
    with pytest.raises(WeightSyncError, match=r"file.*: Not a directory. Fix: .* sync.disk_dir"):
        DiskTransport(tmp_path / "file", model).prepare(fleet, {}, CPU)
    assert fleet.failed == {}


def open_serialized(payload: str, results: Any) -> None:
    opened = pickle.loads(base64.b64decode(payload))
    data = opened["flattened_tensor"]
    results.put([(m.name, tuple(m.shape), data[m.start_idx : m.end_idx].tolist()) for m in opened["metadata"]])


def test_another_process_reads_a_bucket_where_it_lies() -> None:
    bucket = make_buckets()[0]
    payload = serialized(bucket, bucket.data)
    bucket.data.fill_(7)  # after it was serialized: the handle says where the bytes are, not what they are
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=open_serialized, args=(payload, results))
    process.start()
    assert results.get() == [("a", (2, 3), [7] * 12), ("b", (5,), [7] * 10)]
    process.join()
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "x" * 80])
def test_a_host_that_is_not_ours_is_found_before_anything_starts(host: str) -> None:
    check_host(SyncConfig(host="localhost"))
    check_host(SyncConfig(host=host, transport="disk"))
    with pytest.raises(
        ConfigError, match=rf"sync\.host = {host} is not an address of rank 0's machine\. Fix: set it to"
    ):
        check_host(SyncConfig(host=host))


def test_engines_on_other_machines_cannot_share_memory() -> None:
    assert is_on_this_machine("http://127.0.0.1:30000")
    assert is_on_this_machine("http://localhost:30000")
    assert not is_on_this_machine("http://192.0.2.1:30000")
    elsewhere = WeightEndpoint("http://192.0.2.1:30000", None, 1)
    process = EngineProcess(elsewhere.url, "", 1, (0,), "bfloat16", "cpu", False)
    with pytest.raises(
        WeightSyncError, match=r"http://192.0.2.1:30000 is not on rank 0's machine.* Fix: set sync.transport"
    ):
        SharedMemoryTransport(SINGLE).prepare(Fleet([elsewhere]), {elsewhere: process}, CPU)


def test_each_rank_of_an_engine_gets_a_handle() -> None:
    transport = SharedMemoryTransport(SINGLE)
    engine = Endpoint("http://127.0.0.1:1")
    fleet = Fleet([engine])
    transport.prepare(fleet, {engine: EngineProcess(engine.url, "", 2, (0, 1), "bfloat16", "cpu", False)}, CPU)
    transport.send(fleet, make_buckets()[0], "bucket 1 of 1", "3")
    transport.wait(fleet, Phases())
    [(path, body)] = engine.calls
    assert path == "/update_weights_from_tensor"
    assert len(body["serialized_named_tensors"]) == 2
    assert (body["load_format"], body["weight_version"]) == ("flattened_bucket", "3")


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_the_last_bucket_drops_the_old_cache(mode: Any) -> None:
    engine = Endpoint("http://e")
    engine.pause(mode)
    engine.load(["a"], version=None)
    engine.load(["b"], version="3")
    engine.forget_cache()
    assert [path for path, _ in engine.calls] == ["/pause_generation", *["/update_weights_from_tensor"] * 2]
    assert [body["flush_cache"] for _, body in engine.calls[1:]] == [False, True]


def test_requests_paused_in_place_may_keep_the_old_cache() -> None:
    engine = Endpoint("http://e")
    engine.pause("in_place")
    engine.load(["a"], version="3")
    assert not engine.calls[-1][1]["flush_cache"], "or the update would fail"
    engine.failure = "answered 400: Flush cache failed."
    engine.forget_cache()
    assert engine.calls[-1][0] == "/flush_cache"
    engine.failure = "answered 500: oops"
    with pytest.raises(WeightSyncError, match="oops"):
        engine.forget_cache()


def test_disk_dir_without_the_disk_transport() -> None:
    tree = {
        "model": {"hf_path": "unused"},
        "run": {"dir": "unused"},
        "data": {"train": "unused"},
        "algorithm": {"preset": "paper"},
        "sync": {"disk_dir": "/shared"},
    }
    with pytest.raises(ConfigError, match="disk_dir is of use with transport: disk only, not distributed"):
        parse_config(tree)


TRAINER = """
import subprocess, sys, torch
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.shared_memory import serialized
bucket = Bucket.flatten([("a", torch.ones(8))], torch.float32, torch.empty(32, dtype=torch.uint8))
engine = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], serialized(bucket, bucket.data)],
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
)
print(engine.pid, engine.stdout.readline().decode())
"""
ENGINE = """
import base64, pickle, sys, time, torch.multiprocessing
opened = pickle.loads(base64.b64decode(sys.argv[1]))
print("opened", flush=True)
time.sleep(600)
"""


def test_who_reads_the_trainers_output_does_not_wait_for_an_engine() -> None:
    trainer = subprocess.run([sys.executable, "-c", TRAINER, ENGINE], capture_output=True, text=True, timeout=120)
    engine, opened = trainer.stdout.split()
    os.kill(int(engine), signal.SIGKILL)
    assert opened == "opened", trainer.stderr
