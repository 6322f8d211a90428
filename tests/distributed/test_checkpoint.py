"""Checkpoints by real ranks: training that went through one goes on as if it had not, in any layout."""

import json
import multiprocessing
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gppo.algorithm import EntropyControl, values_in_force
from megatron_gppo.convert import (
    Architecture,
    HfCheckpoint,
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    parameters,
)
from megatron_gppo.datatypes import EntropyPoint
from megatron_gppo.parallel import PeerFailed
from megatron_gppo.policy import CheckpointError, Policy, Progress, checkpoint
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, leave_model_parallel, make_config, make_samples, pack
from tests.support.tiny import make_tiny_model

PROGRESS = Progress(
    step=1,
    updates=2,
    data_position=8,
    entropy_control=EntropyControl(0.1 + 0.2, 1.0, -1 / 3),
    entropy_trace=(EntropyPoint(covariance=0.1 + 0.2, entropy=1 / 3), EntropyPoint(covariance=-1e-9, entropy=2.0)),
)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


def train_step(policy: Policy, step: int) -> None:
    """One step of two updates, the steps before it having had as many."""
    samples = make_samples(8, 4, policy.architecture.vocab_size, seed=step)
    in_force = values_in_force(policy.config, step, range(2 * step - 2, 2 * step), control=None)
    for batch, values in zip(policy.add_old_logprobs(pack(policy, samples)), in_force, strict=True):
        stats = policy.update(batch, values)
        assert not stats.skipped


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in policy.shards().items()}


def empty_policy(hf_folder: Path, layout: str, **optimizer: Any) -> Policy:
    config = make_config(hf_folder, LAYOUTS[layout], optimizer={"lr": 1e-3, "warmup_updates": 1, **optimizer})
    policy = build_policy(config)
    for _, parameter in policy.named_parameters():
        parameter.data.zero_()  # whatever is not loaded shows
    policy.optimizer.reload_model_params()
    return policy


def two_steps(rank: int, hf_folder: Path, folder: Path, layout: str, distributed: bool) -> Any:
    config = make_config(
        hf_folder, LAYOUTS[layout], optimizer={"lr": 1e-3, "warmup_updates": 1, "distributed": distributed}
    )
    policy = build_policy(config)
    train_step(policy, step=1)
    checkpoint.save(folder / checkpoint.folder_name(1), policy, PROGRESS, hf_folder)
    saved = weights(policy)
    train_step(policy, step=2)
    return saved, weights(policy)


def load_and_step(rank: int, hf_folder: Path, folder: Path, layouts: list[str], distributed: bool) -> Any:
    results = {}
    for layout in layouts:
        policy = empty_policy(hf_folder, layout, distributed=distributed)
        assert checkpoint.load(folder / checkpoint.folder_name(1), policy) == PROGRESS
        loaded = weights(policy)
        train_step(policy, step=2)
        results[layout] = loaded, weights(policy), policy.parallel.tp_rank
        leave_model_parallel()
    return results


@pytest.mark.parametrize(
    ("saved_as", "distributed", "others"),
    [
        ("dp2", True, ["tp2", "pp2_vpp2", "cp2"]),
        ("dp2", False, ["tp2", "pp2_vpp2"]),
        ("pp2", True, []),
        ("tp2", True, []),
        ("cp2", True, ["dp2"]),
    ],
)
def test_the_next_step_is_the_one_that_would_have_followed(
    hf_folder: Path, tmp_path: Path, saved_as: str, distributed: bool, others: list[str]
) -> None:
    check_resumes(hf_folder, tmp_path, saved_as, others, distributed)


def test_experts_resume_and_export_what_was_trained(tmp_path: Path) -> None:
    hf_folder = make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM", stacked_experts=True)
    trained = check_resumes(hf_folder, tmp_path, "ep2", ["tp2_sp", "pp2"], distributed=True)
    convert_megatron_to_hf(tmp_path / checkpoint.folder_name(1), tmp_path / "exported", verify=True)
    exported = HfCheckpoint(tmp_path / "exported")
    assert exported.stacked_experts
    for parameter in parameters(Architecture.from_hf(hf_folder)):
        full = parameter.from_hf({name: exported.read(name) for name in parameter.hf_names})
        assert torch.equal(full, trained[parameter.name]), parameter.name


def check_resumes(
    hf_folder: Path, tmp_path: Path, saved_as: str, others: list[str], distributed: bool
) -> dict[str, torch.Tensor]:
    """Returns the full weights that were saved, by canonical name, if no rank of `saved_as` has a part of a tensor."""
    before = run_ranks(2, two_steps, hf_folder, tmp_path, saved_as, distributed)
    after = run_ranks(2, load_and_step, hf_folder, tmp_path, [saved_as, *others], distributed)
    for rank in range(2):
        for uninterrupted, resumed in zip(before[rank], after[rank][saved_as][:2], strict=True):
            for name in uninterrupted:
                assert torch.equal(uninterrupted[name], resumed[name]), name
    for layout in others:
        for rank in range(2):
            _, resumed, tp_rank = after[rank][layout]
            for name, shard in resumed.items():
                assert_part_of((before[0][1] | before[1][1])[name], shard, tp_rank, name)
    return before[0][0] | before[1][0]


def assert_part_of(full: torch.Tensor, shard: torch.Tensor, tp_rank: int, name: str) -> None:
    """Replicated tensors and first axes of rows are enough to tell; layouts themselves are tested with the conversion."""
    if shard.shape == full.shape:
        torch.testing.assert_close(shard, full, rtol=0, atol=2e-6, msg=name)
    elif "linear_proj" in name or "linear_fc2" in name:
        columns = shard.shape[1]
        torch.testing.assert_close(shard, full[:, tp_rank * columns : (tp_rank + 1) * columns], rtol=0, atol=2e-6)


def load_converted(rank: int, hf_folder: Path, converted: Path, layouts: list[str]) -> bool:
    for layout in layouts:
        expected = build_policy(make_config(hf_folder, LAYOUTS[layout]))
        want = weights(expected)
        leave_model_parallel()
        policy = empty_policy(hf_folder, layout)
        checkpoint.load_weights(converted, policy)
        got = weights(policy)
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(got[name], want[name]), (layout, name)
        leave_model_parallel()
    return True


def test_a_converted_checkpoint_loads_in_every_layout(hf_folder: Path, tmp_path: Path) -> None:
    convert_hf_to_megatron(hf_folder, tmp_path / "converted")
    assert all(run_ranks(2, load_converted, hf_folder, tmp_path / "converted", ["dp2", "tp2", "pp2", "pp2_vpp2"]))


def load_wrong(rank: int, hf_folder: Path, other: Path, no_checkpoint: Path) -> list[str]:
    config = make_config(hf_folder)
    policy = build_policy(config)
    messages = []
    for folder in (other, no_checkpoint):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_weights(folder, policy)
        messages.append(str(error.value))
    return messages


def test_a_checkpoint_of_another_model_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    convert_hf_to_megatron(other, tmp_path / "converted")
    ((another, missing),) = run_ranks(1, load_wrong, hf_folder, tmp_path / "converted", tmp_path / "nothing")
    assert "hidden_size is 32, in model.hf_path 64" in another
    assert "not a torch_dist checkpoint" in missing


def save_where_it_cannot(rank: int, hf_folder: Path, folder: Path) -> str:
    policy = build_policy(make_config(hf_folder))
    with pytest.raises(CheckpointError if rank == 0 else PeerFailed) as error:
        checkpoint.save(folder / checkpoint.folder_name(1), policy, PROGRESS, hf_folder)
    return str(error.value)


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_nothing(hf_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in run_ranks(2, save_where_it_cannot, hf_folder, tmp_path / "file"):
        assert "could not be written (rank 0: NotADirectoryError" in message


def save_to_a_full_disk(rank: int, hf_folder: Path, folder: Path) -> str:
    """A limit on the size of files stands in for the end of the disk; the writers' processes inherit it."""
    policy = build_policy(make_config(hf_folder))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises((CheckpointError, PeerFailed)) as error:
            checkpoint.save(folder / checkpoint.folder_name(1), policy, PROGRESS, hf_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value)


def test_a_full_disk_is_an_error_and_leaves_nothing(hf_folder: Path, tmp_path: Path) -> None:
    for message in run_ranks(2, save_to_a_full_disk, hf_folder, tmp_path / "checkpoints"):
        assert "step_00000001: could not be written" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def save_and_count(rank: int, hf_folder: Path, folder: Path) -> int:
    """Processes that a save leaves running."""
    policy = build_policy(make_config(hf_folder))
    train_step(policy, step=1)
    checkpoint.save(folder / checkpoint.folder_name(1), policy, PROGRESS, hf_folder)
    return len(multiprocessing.active_children())


def test_saving_starts_nothing_that_outlives_it(hf_folder: Path, tmp_path: Path) -> None:
    """Megatron would have a process hold its writers' results, which imports the trainer and does not end with it."""
    assert run_ranks(2, save_and_count, hf_folder, tmp_path) == [0, 0]


def test_only_complete_checkpoints_are_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        folder = tmp_path / checkpoint.folder_name(step)
        folder.mkdir()
        (folder / checkpoint.MANIFEST).write_text(json.dumps({}))
    (tmp_path / checkpoint.folder_name(20)).mkdir()  # no manifest
    (tmp_path / ".step_00000025.partial").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / checkpoint.folder_name(15)
    checkpoint.prune(tmp_path, keep_last=2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step_00000010", "step_00000015", "step_00000020"]
    assert checkpoint.newest(tmp_path / "nowhere") is None
