"""The exported buckets are the HF tensors, bit for bit, from every layout; a failing engine ends all ranks alike."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_gppo.config import Config, parse_config
from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.parallel import PeerFailed
from megatron_gppo.weight_sync import WeightSync, WeightSyncError, sync
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.export import Exporter
from megatron_gppo.weight_sync.fleet import Fleet
from megatron_gppo.weight_sync.transport import SendAgainError, Transport
from tests.support.distributed import run_ranks
from tests.support.policy_shards import cut, hf_tensors, make_parallel_state
from tests.support.synced_engines import GivenEngines
from tests.support.tiny import make_tiny_model

BUCKET_BYTES = 40_000  # several buckets a stage; linear_fc1 and larger ones get one of their own


@dataclass(frozen=True)
class Case:
    folder: Path
    layout: dict[str, int]
    interleaved: bool = False
    dtype: torch.dtype = torch.float32


def export_rank(rank: int, cases: list[Case]) -> list[tuple[int, list[Bucket]]]:
    return [export_case(rank, case) for case in cases]


def export_case(rank: int, case: Case) -> tuple[int, list[Bucket]]:
    architecture = Architecture.from_hf(case.folder)
    parallel = make_parallel_state(rank, **case.layout)
    shards = cut(architecture, hf_tensors(case.folder), parallel, interleaved=case.interleaved)
    exporter = Exporter(parameters(architecture), shards, parallel, case.dtype, BUCKET_BYTES)
    for _ in range(2):  # the second time into used buffers
        items = [
            None if bucket is None else replace(bucket, data=bucket.data.clone()) for bucket in exporter.export(shards)
        ]
    assert len(items) == exporter.num_buckets
    return exporter.num_buckets, [bucket for bucket in items if bucket is not None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        "qwen2": make_tiny_model(root / "qwen2"),
        "qwen2 tied": make_tiny_model(root / "qwen2-tied", tie_word_embeddings=True),
        "qwen3 tied": make_tiny_model(root / "qwen3-tied", "Qwen3ForCausalLM", tie_word_embeddings=True),
        "experts": make_tiny_model(root / "experts", "Qwen3MoeForCausalLM"),
    }


def check_exports(world_size: int, cases: list[Case]) -> None:
    by_rank = run_ranks(world_size, export_rank, cases)
    for index, case in enumerate(cases):
        expected = hf_tensors(case.folder)
        num_buckets, buckets = by_rank[0][index]
        names = [name for bucket in buckets for name in bucket.names]
        assert len(buckets) == num_buckets > 4, case
        assert len(names) == len(set(names)), case
        assert set(names) == set(expected), case
        for bucket in buckets:
            for name, tensor in bucket.tensors().items():
                assert torch.equal(tensor, expected[name].to(case.dtype)), (case, name)
        assert all(results[index] == (num_buckets, []) for results in by_rank[1:]), case


def test_two_ranks_export_the_hf_tensors(folders: dict[str, Path]) -> None:
    check_exports(
        2,
        [
            Case(folders["qwen2"], {"tp": 2}),
            Case(folders["qwen2"], {"tp": 2}, dtype=torch.bfloat16),
            Case(folders["qwen3 tied"], {"tp": 2}),
            Case(folders["qwen2"], {"pp": 2}),
            Case(folders["qwen2 tied"], {"pp": 2}),
            Case(folders["qwen3 tied"], {"pp": 2}, interleaved=True),
            Case(folders["qwen2"], {"dp": 2}),
            Case(folders["experts"], {"dp": 2}),
            Case(folders["experts"], {"dp": 2, "ep": 2}),
            Case(folders["experts"], {"tp": 2, "ep": 2}),
            Case(folders["experts"], {"tp": 2}, dtype=torch.bfloat16),
            Case(folders["qwen2"], {"cp": 2}),
        ],
    )


def test_four_ranks_export_the_hf_tensors(folders: dict[str, Path]) -> None:
    check_exports(
        4,
        [
            Case(folders["qwen2"], {"tp": 2, "pp": 2}),
            Case(folders["qwen2 tied"], {"tp": 2, "pp": 2}, interleaved=True),
            Case(folders["qwen3 tied"], {"pp": 2, "dp": 2}),
            Case(folders["qwen2"], {"tp": 2, "dp": 2}),
            Case(folders["qwen2 tied"], {"pp": 2, "cp": 2}),
            Case(folders["qwen2"], {"cp": 2, "dp": 2}),
            Case(folders["qwen2"], {"tp": 4}),  # more ranks than KV heads
            Case(folders["experts"], {"tp": 2, "pp": 2, "ep": 2}),
            Case(folders["experts"], {"pp": 2, "dp": 2, "ep": 2}, interleaved=True),
            Case(folders["experts"], {"tp": 2, "dp": 2, "ep": 4}),
            Case(folders["experts"], {"dp": 4, "ep": 2}),
        ],
    )


def refuse_wrong_shards(rank: int, folder: Path) -> str:
    architecture = Architecture.from_hf(folder)
    parallel = make_parallel_state(rank, tp=2)
    shards = cut(architecture, hf_tensors(folder), parallel)
    if rank == 1:
        shards["decoder.final_layernorm.weight"] = shards["decoder.final_layernorm.weight"][:-1]
    with pytest.raises(ValueError, match="does not fit") as error:
        Exporter(parameters(architecture), shards, parallel, torch.float32, BUCKET_BYTES)
    return str(error.value)


def test_one_rank_s_wrong_shard_is_named_on_every_rank(folders: dict[str, Path]) -> None:
    messages = run_ranks(2, refuse_wrong_shards, folders["qwen2"])

    assert messages[0] == messages[1]
    assert "rank 1 has decoder.final_layernorm.weight of shape (63,), not (64,)" in messages[0]


def make_config(folder: Path, *urls: str) -> Config:
    return parse_config(
        {
            "model": {"hf_path": str(folder), "dtype": "fp32"},
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "algorithm": {"preset": "paper"},
            "rollout": {"mode": "external", "urls": list(urls)},
        }
    )


def sync_to_nobody(rank: int, folder: Path, url: str) -> tuple[str, str]:
    architecture = Architecture.from_hf(folder)
    parallel = make_parallel_state(rank, tp=2)
    shards = cut(architecture, hf_tensors(folder), parallel)
    weight_sync = WeightSync(make_config(folder, url), architecture, parallel, GivenEngines(url) if rank == 0 else None)
    messages = []
    for attempt in (
        lambda: weight_sync.sync(shards, 1),
        lambda: weight_sync.verify_start(shards, 1, engines_hold_policy=True),
    ):
        with pytest.raises(WeightSyncError if rank == 0 else PeerFailed) as error:
            attempt()
        messages.append(str(error.value))
    weight_sync.close()
    return messages[0], messages[1]


def test_an_engine_that_is_gone_fails_every_rank(folders: dict[str, Path]) -> None:
    url = "http://127.0.0.1:9"  # the discard port: nobody listens

    results = run_ranks(2, sync_to_nobody, folders["qwen2"], url)

    for sync_message, verify_message in results:
        assert "no engine is left; phase 'read the engine's layout'" in sync_message
        assert "no engine is left; phase 'pause'" in verify_message
        assert url in sync_message
        assert url in verify_message


ENGINES = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]


def sync_again(rank: int, folder: Path) -> tuple[list[list[str]], set[str], dict[str, str], int]:
    """What each push saw, the tensors of the last one, who was lost, and the bytes that this rank says were sent."""
    architecture = Architecture.from_hf(folder)
    parallel = make_parallel_state(rank, tp=2, pp=2)
    shards = cut(architecture, hf_tensors(folder), parallel)
    fleets: list[list[str]] = []
    names: set[str] = set()

    def push(
        fleet: Fleet,
        transport: Transport,
        buckets: Iterator[Bucket],
        num_buckets: int,
        num_bytes: int,
        **settings: object,
    ) -> None:
        fleets.append([endpoint.url for endpoint in fleet.endpoints])
        names.update(next(buckets).names)
        if len(fleets) < 3:
            fleet.lose(fleet.endpoints[0], "load bucket 1", WeightSyncError("it died"))
            raise SendAgainError
        names.update(name for bucket in buckets for name in bucket.names)

    sync.push = push
    engines = GivenEngines(*ENGINES)
    weight_sync = WeightSync(make_config(folder, *ENGINES), architecture, parallel, engines if rank == 0 else None)
    stats = weight_sync.sync(shards, 1)
    assert rank != 0 or engines.versions == {ENGINES[2]: 1}
    return fleets, names, engines.failures, stats.num_bytes


def test_every_rank_exports_again_for_the_engines_that_are_left(folders: dict[str, Path]) -> None:
    fleets, names, failures, num_bytes = run_ranks(4, sync_again, folders["qwen2"])[0]

    tensors = hf_tensors(folders["qwen2"])
    assert fleets == [ENGINES, ENGINES[1:], ENGINES[2:]]
    assert names == set(tensors)
    assert list(failures) == ENGINES[:2]
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
