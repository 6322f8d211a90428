"""Weight sync from a GPU: the export, handles for other processes, and, where SGLang is installed, a real engine."""

import base64
import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

from megatron_gppo.config import parse_config
from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.metrics import Phases
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync import WeightSync
from megatron_gppo.weight_sync.endpoint import EngineProcess, WeightEndpoint
from megatron_gppo.weight_sync.export import Exporter
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.shared_memory import DEVICE_ARGUMENT, SharedMemoryTransport
from tests.support.policy_shards import SINGLE, cut, hf_tensors
from tests.support.rollout import make_config
from tests.support.synced_engines import GivenEngines
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROBE = [5, 14, 6, 13, 8, 1, 20, 33, 2, 40, 7, 7]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("new_model") / "tiny", seed=1)


def shards_on_gpu(folder: Path) -> Tensors:
    return {name: shard.cuda() for name, shard in cut(Architecture.from_hf(folder), hf_tensors(folder), SINGLE).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_are_the_hf_tensors(model: Path, dtype: torch.dtype) -> None:
    shards, expected = shards_on_gpu(model), hf_tensors(model)
    exporter = Exporter(parameters(Architecture.from_hf(model)), shards, SINGLE, dtype, 60_000)
    found: Tensors = {}
    for bucket in exporter.export(shards):
        assert bucket is not None
        found |= {name: tensor.cpu() for name, tensor in bucket.tensors().items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


class Receiver(WeightEndpoint):
    """Keeps what it is told to load."""

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        assert body is not None
        self.payload: str = body["serialized_named_tensors"][0]
        return b"{}"


def open_payload(payload: str, results: Any) -> None:
    """As SGLang does, which takes a GPU by its UUID."""
    rebuild = reductions.rebuild_cuda_tensor

    def by_uuid(*arguments: Any) -> torch.Tensor:
        assert str(torch.cuda.get_device_properties(0).uuid) == arguments[DEVICE_ARGUMENT]
        return rebuild(*arguments[:DEVICE_ARGUMENT], 0, *arguments[DEVICE_ARGUMENT + 1 :])

    reductions.rebuild_cuda_tensor = by_uuid
    opened = pickle.loads(base64.b64decode(payload))
    results.put(opened["flattened_tensor"].cpu().numpy().tobytes())


def test_another_process_reads_a_bucket_on_the_gpu(model: Path) -> None:
    shards = shards_on_gpu(model)
    exporter = Exporter(parameters(Architecture.from_hf(model)), shards, SINGLE, torch.bfloat16, 60_000)
    bucket = next(exporter.export(shards))
    assert bucket is not None
    receiver = Receiver("http://127.0.0.1:1", None, 1)
    fleet = Fleet([receiver])
    transport = SharedMemoryTransport(SINGLE)
    transport.prepare(
        fleet, {receiver: EngineProcess(receiver.url, "", 1, (0,), "bfloat16", "cuda", False)}, bucket.data.device
    )
    transport.pass_bucket(bucket, bucket.data.numel(), [receiver.url], bucket.data.device)
    transport.send(fleet, bucket, "bucket 1 of 1", None)
    transport.wait(fleet, Phases())

    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=open_payload, args=(receiver.payload, results))
    process.start()
    assert results.get() == bucket.data.cpu().numpy().tobytes()
    process.join()


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedServer]:
    if find_spec("sglang") is None:
        pytest.skip("needs SGLang")
    folder = tmp_path_factory.mktemp("server")
    args = {"mem_fraction_static": 0.3, "attention_backend": "triton", "sampling_backend": "pytorch"}
    with ManagedServer(make_config(model, folder, server_args=args), folder / "sglang.log") as running:
        running.wait_ready()
        yield running


@pytest.mark.parametrize("transport", ["tensor", "distributed", "disk"])
def test_a_real_engine_gets_the_weights(
    server: ManagedServer, model: Path, new_model: Path, tmp_path: Path, transport: str
) -> None:
    if transport == "distributed" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two ranks on one GPU")
    config = make_config(model, tmp_path)
    config = replace_sync(config.model_dump(mode="json"), transport)
    engine = WeightEndpoint(server.url, None, 60)
    weight_sync = WeightSync(config, Architecture.from_hf(model), SINGLE, GivenEngines(server.url))
    weight_sync.verify_start(shards_on_gpu(model), 0, engines_hold_policy=False)
    old = engine.prompt_logprobs(PROBE)
    weight_sync.sync(shards_on_gpu(new_model), 1)
    assert (engine.prompt_logprobs(PROBE) - old).abs().max() > 0.1
    weight_sync.sync(shards_on_gpu(model), 2)
    assert (engine.prompt_logprobs(PROBE) - old).abs().max() < 1e-5
    weight_sync.close()


def replace_sync(tree: dict[str, Any], transport: str) -> Any:
    return parse_config({**tree, "sync": {"transport": transport, "timeout_s": 60}})
