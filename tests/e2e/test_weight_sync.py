"""Weights pushed into a real SGLang server are what it then computes with, and every failure says where it happened."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.config import Config, parse_config
from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync import WeightSync, WeightSyncError
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from megatron_gppo.weight_sync.export import Bucket, Exporter
from megatron_gppo.weight_sync.push import WeightPusher
from megatron_gppo.weight_sync.verify import check_restored, reset_weights
from tests.support.policy_shards import SINGLE, cut, hf_tensors
from tests.support.rollout import make_config, processes_below
from tests.support.tiny import make_tiny_model

PROBE = [5, 14, 6, 13, 8, 1, 20, 33, 2, 40, 7, 7]
CPU = torch.device("cpu")
TIMEOUT_S = 120.0
BUCKET_BYTES = 60_000

Tensors = dict[str, torch.Tensor]


def make_sync_config(urls: list[str]) -> Config:
    return parse_config(
        {
            "model": {"hf_path": "unused", "dtype": "fp32"},
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "algorithm": {"preset": "paper"},
            "rollout": {"mode": "external", "urls": urls},
            "sync": {"timeout_s": TIMEOUT_S},
        }
    )


def make_pusher(*urls: str) -> WeightPusher:
    return WeightPusher([WeightEndpoint(url, None, TIMEOUT_S) for url in urls], "127.0.0.1", TIMEOUT_S)


def shards_of(folder: Path) -> Tensors:
    return cut(Architecture.from_hf(folder), hf_tensors(folder), SINGLE)


def buckets_of(folder: Path) -> list[Bucket]:
    shards = shards_of(folder)
    table = parameters(Architecture.from_hf(folder))
    return list(Exporter(table, shards, SINGLE, torch.float32, BUCKET_BYTES).export(shards))


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
def engine(server: ManagedServer, tiny_model: Path) -> Iterator[WeightEndpoint]:
    """The session's server, which gets its weights back at the end."""
    yield WeightEndpoint(server.url, None, TIMEOUT_S)
    weight_sync = WeightSync(make_sync_config([server.url]), Architecture.from_hf(tiny_model), SINGLE, [server.url])
    weight_sync.sync(shards_of(tiny_model), 0)
    weight_sync.close()


@pytest.fixture
def weight_sync(engine: WeightEndpoint, tiny_model: Path) -> Iterator[WeightSync]:
    weight_sync = WeightSync(make_sync_config([engine.url]), Architecture.from_hf(tiny_model), SINGLE, [engine.url])
    yield weight_sync
    weight_sync.close()


def test_the_engine_computes_with_the_weights_it_was_sent(
    weight_sync: WeightSync, engine: WeightEndpoint, tiny_model: Path, new_model: Path
) -> None:
    old, new = hf_logprobs(tiny_model), hf_logprobs(new_model)
    assert (engine.prompt_logprobs(PROBE) - old).abs().max() < 2e-5

    stats = weight_sync.sync(shards_of(new_model), 7)

    assert stats.num_bytes == sum(tensor.nbytes for tensor in hf_tensors(new_model).values())
    assert engine.weight_version() == "7"
    assert (old - new).abs().max() > 0.1
    assert (engine.prompt_logprobs(PROBE) - new).abs().max() < 2e-5
    assert weight_sync.verify_probe(PROBE, new) < 2e-5
    with pytest.raises(WeightSyncError, match=f"probe: the log-probs of {engine.url} differ"):
        weight_sync.verify_probe(PROBE, old)


def test_many_buckets_load_as_one_does(engine: WeightEndpoint, new_model: Path) -> None:
    buckets = buckets_of(new_model)
    assert len(buckets) > 5
    pusher = make_pusher(engine.url)
    pusher.join(CPU)
    pusher.push(buckets, len(buckets), 8)
    pusher.push(buckets, len(buckets), 9)
    pusher.close()
    assert engine.weight_version() == "9"
    assert (engine.prompt_logprobs(PROBE) - hf_logprobs(new_model)).abs().max() < 2e-5


def test_the_start_is_verified_tensor_by_tensor(weight_sync: WeightSync, tiny_model: Path, new_model: Path) -> None:
    weight_sync.verify_start(shards_of(tiny_model), 0, engines_hold_policy=True)
    # A resumed run: the engine holds what it loaded, the policy something else.
    weight_sync.verify_start(shards_of(new_model), 3, engines_hold_policy=False)
    assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 2e-5


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
    pusher = make_pusher(engine.url)
    pusher.join(CPU)
    before = reset_weights(engine)
    pusher.push(buckets, len(buckets), 0)
    pusher.close()
    with pytest.raises(WeightSyncError, match=r"1 of .* lm_head.weight \(tp rank 0\)\."):
        check_restored(engine, before)


def test_a_tensor_of_a_wrong_shape(engine: WeightEndpoint, tiny_model: Path) -> None:
    buckets = buckets_of(tiny_model)
    buckets[1] = Bucket.flatten([("model.norm.weight", torch.zeros(3))], torch.float32)
    pusher = make_pusher(engine.url)
    pusher.join(CPU)
    with pytest.raises(
        WeightSyncError, match=f"phase 'load bucket 2 of {len(buckets)}': {engine.url}.* 400: "
    ) as error:
        pusher.push(buckets, len(buckets), 1)
    assert "[3]" in str(error.value)
    pusher.close()


def test_a_session_that_a_killed_trainer_left_open(
    weight_sync: WeightSync, engine: WeightEndpoint, new_model: Path
) -> None:
    engine.pause()
    engine.begin_update()
    weight_sync.sync(shards_of(new_model), 2)
    assert engine.weight_version() == "2"
    assert weight_sync.verify_probe(PROBE, hf_logprobs(new_model)) < 2e-5


def test_several_engines_and_one_that_dies(
    weight_sync: WeightSync, engine: WeightEndpoint, tiny_model: Path, new_model: Path, tmp_path: Path
) -> None:
    with ManagedServer(make_config(tiny_model, tmp_path, engine_tp=2), tmp_path / "sglang.log") as second:
        second.wait_ready()
        urls = [second.url, engine.url]  # two TP ranks before one
        both = WeightSync(make_sync_config(urls), Architecture.from_hf(tiny_model), SINGLE, urls)
        both.verify_start(shards_of(tiny_model), 0, engines_hold_policy=True)
        both.sync(shards_of(new_model), 4)
        assert both.verify_probe(PROBE, hf_logprobs(new_model)) < 2e-5
        both.close()

        wrong = shards_of(tiny_model)
        wrong["decoder.layers.1.mlp.linear_fc2.weight"][3, -1] += 1e-3  # the last columns are on the second TP rank
        alone = WeightSync(make_sync_config([second.url]), Architecture.from_hf(tiny_model), SINGLE, [second.url])
        alone.sync(shards_of(tiny_model), 5)
        with pytest.raises(WeightSyncError, match=r"1 of .* model.layers.1.mlp.down_proj.weight \(tp rank 1\)"):
            alone.verify_start(wrong, 6, engines_hold_policy=True)
        alone.close()

        buckets = buckets_of(tiny_model)

        def killing() -> Iterator[Bucket]:
            yield from buckets[:2]
            for process in processes_below(second.guard_pid)[1:]:
                os.kill(process, signal.SIGKILL)
            yield from buckets[2:]

        pusher = make_pusher(second.url)
        pusher.join(CPU)
        with pytest.raises(
            WeightSyncError, match=rf"phase '(load|broadcast) bucket [23] of {len(buckets)}'.*{second.url}"
        ):
            pusher.push(killing(), len(buckets), 7)
        pusher.close()
