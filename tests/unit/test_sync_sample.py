"""The rolling sample of checksums, against engines that are dictionaries."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_gppo.weight_sync import WeightSyncError
from megatron_gppo.weight_sync.bucket import Bucket, num_bytes
from megatron_gppo.weight_sync.endpoint import Checksums, EngineProcess, EngineTensor
from megatron_gppo.weight_sync.sample import RollingSample, digest, engine_name

CPU = EngineProcess("http://e", "1", 1, (0,), "float32", "cpu", False)
GPU = replace(CPU, device="cuda")
TWO_RANKS = replace(GPU, tp_size=2)
LAYERS = 2
Tensors = dict[str, Tensor]


def make_tensors(layers: int = LAYERS) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (65, 4), "model.norm.weight": (4,)}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (4, 4)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (4,)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def bucket(tensors: Tensors) -> Bucket:
    size = num_bytes([tuple(tensor.shape) for tensor in tensors.values()], torch.float32)
    return Bucket.flatten(list(tensors.items()), torch.float32, torch.empty(size, dtype=torch.uint8))


def held(tensors: Tensors, skip: list[str], tp_size: int = 1) -> Checksums:
    """What an engine says: q, k and v as one; o_proj cut by columns."""
    fused: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        fused.setdefault(engine_name(name), []).append(tensor)
    checksums = {}
    for name, parts in fused.items():
        if any(pattern in name for pattern in skip):
            continue
        whole = torch.cat(parts)
        for rank in range(tp_size):
            own = whole.chunk(tp_size, dim=1)[rank].contiguous() if "o_proj" in name else whole
            checksums[EngineTensor(name, rank)] = digest(own)
    return checksums


def sync(sample: RollingSample, sent: Tensors, engines: dict[EngineProcess, Tensors]) -> None:
    sample.begin()
    sample.add(bucket(sent))
    sample.check({process: held(tensors, sample.skip, process.tp_size) for process, tensors in engines.items()})


def changed(tensors: Tensors, name: str) -> Tensors:
    other = tensors[name].clone()
    other.view(-1)[-1] += 1
    return {**tensors, name: other}


def test_every_tensor_has_its_turn_and_no_more_than_a_layer_is_hashed() -> None:
    tensors = make_tensors(layers=12)  # layer 1 is not layer 11
    sample = RollingSample(list(tensors))
    seen: list[str] = []
    for _ in range(13):
        turn = {tensor.name for tensor in held(tensors, sample.skip)}
        assert len({name.split(".")[2] for name in turn if ".layers." in name}) <= 1
        seen += turn
        sync(sample, tensors, {CPU: tensors})
    assert sorted(seen) == sorted({engine_name(name) for name in tensors})


@pytest.mark.parametrize("process", [CPU, GPU, TWO_RANKS], ids=["cpu", "gpu", "tp 2"])
def test_what_is_sent_is_what_is_held(process: EngineProcess) -> None:
    tensors = make_tensors()
    sample = RollingSample(list(tensors))
    for turn in range(9):
        sync(sample, tensors, {process: tensors, replace(process, url="http://f"): tensors})
        if turn % 2:
            for name in tensors:
                tensors = changed(tensors, name)


@pytest.mark.parametrize("process", [CPU, GPU, TWO_RANKS], ids=["cpu", "gpu", "tp 2"])
@pytest.mark.parametrize("name", ["k_proj", "o_proj", "input_layernorm"])
def test_a_tensor_that_stays_as_it_was(process: EngineProcess, name: str) -> None:
    old = make_tensors()
    new = changed(old, next(full for full in old if f"layers.1.{name}" in full or f"layers.1.self_attn.{name}" in full))
    sample = RollingSample(list(old))
    for _ in range(5):
        sync(sample, old, {process: old})
    with pytest.raises(WeightSyncError, match=r"http://e: 1 tensors .*: model.layers.1\S+ \((as before|not what)"):
        sync(sample, new, {process: old})


@pytest.mark.parametrize("process", [CPU, GPU, TWO_RANKS], ids=["cpu", "gpu", "tp 2"])
def test_a_tensor_that_changes_by_itself(process: EngineProcess) -> None:
    tensors = make_tensors()
    sample = RollingSample(list(tensors))
    for _ in range(4):
        sync(sample, tensors, {process: tensors})
    damaged = changed(tensors, "model.layers.0.self_attn.v_proj.weight")
    with pytest.raises(WeightSyncError, match=r"1 tensors .*layers.0.self_attn.qkv_proj.weight \(changed"):
        sync(sample, tensors, {process: damaged})


def test_the_first_time_the_cpu_and_other_engines_tell() -> None:
    tensors = make_tensors()
    damaged = changed(tensors, "model.norm.weight")
    with pytest.raises(WeightSyncError, match=r"http://e: 1 tensors .*: model.norm.weight \(not what was sent\)"):
        sync(RollingSample(list(tensors)), tensors, {CPU: damaged})
    with pytest.raises(
        WeightSyncError, match=r"http://f: .*model.norm.weight \(tp rank 0\) \(another engine's differs\)"
    ):
        sync(RollingSample(list(tensors)), tensors, {GPU: tensors, replace(GPU, url="http://f"): damaged})


def test_a_tensor_that_the_engine_does_not_have() -> None:
    tensors = make_tensors()
    held_by_engine = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"1 tensors .*: model.norm.weight \(not there\)"):
        sync(RollingSample(list(tensors)), tensors, {GPU: held_by_engine})


def test_a_restarted_engine_is_not_compared_with_what_it_was_before() -> None:
    old = make_tensors()
    sample = RollingSample(list(old))
    for _ in range(3):
        sync(sample, old, {GPU: old})
    new = changed(old, "model.norm.weight")
    sync(sample, old, {replace(GPU, started="2"): new})


def test_a_quantized_engine_may_hold_the_same_after_a_small_change() -> None:
    old = make_tensors()
    sample = RollingSample(list(old))
    for _ in range(3):
        sync(sample, old, {replace(GPU, quantized=True): old})
    sync(sample, changed(old, "model.norm.weight"), {replace(GPU, quantized=True): old})


def test_a_push_that_failed_in_between_has_its_turn_again() -> None:
    tensors = make_tensors()
    sample = RollingSample(list(tensors))
    turn = sample.skip
    sample.begin()
    sample.add(bucket(changed(tensors, "model.norm.weight")))
    assert sample.skip == turn
    sync(sample, tensors, {CPU: tensors})
    assert sample.skip != turn


def test_a_tensor_that_is_not_sent() -> None:
    tensors = make_tensors()
    sample = RollingSample([*tensors, "lm_head.weight"])
    with pytest.raises(WeightSyncError, match=f"{len(tensors)} tensors were sent, not {len(tensors) + 1}"):
        sync(sample, tensors, {GPU: tensors})
