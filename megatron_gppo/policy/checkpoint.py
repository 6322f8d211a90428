"""torch_dist checkpoints: weights alone, or everything that a run needs to go on.

A checkpoint is a folder step_00000040/ with the torch_dist files, hf/ (configuration and tokenizer, so that it can be
exported by itself) and manifest.json. It is written under a temporary name and renamed when complete, so a folder
that has its final name is whole. All ranks must see the same file system.
"""

import json
import queue
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_gppo.algorithm import EntropyControl
from megatron_gppo.convert import Architecture, keep_hf_assets
from megatron_gppo.datatypes import EntropyPoint
from megatron_gppo.parallel import ParallelState, PeerFailed, is_of_communication
from megatron_gppo.policy.optimizer_checkpoint import allocate_state
from megatron_gppo.policy.policy import Policy

METADATA = {  # pass copies: Megatron adds the current groups to what it is given
    # One key a layer, so that any pipeline layout finds its layers.
    "non_homogeneous_layers": True,
    # Optimizer state in the shape of the parameters, so that any layout can load it.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
MANIFEST = "manifest.json"
EXTRA_STATE = "._extra_state"  # grouped experts append a number


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written. One line: what, where, and the fix."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: what its checkpoint's manifest holds."""

    step: int  # steps done; also the version of the weights
    updates: int  # optimizer steps done
    data_position: int  # prompts taken
    entropy_trace: tuple[EntropyPoint, ...] = ()  # of the last steps
    entropy_control: EntropyControl | None = None  # as the last step left it; None without a controller


def save(folder: Path, policy: Policy, progress: Progress, hf_path: Path) -> None:
    """Writes a checkpoint, all ranks together. Raises CheckpointError, and then leaves nothing under `folder`."""
    parallel = policy.parallel
    partial = folder.with_name(f".{folder.name}.partial")

    def start() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        keep_hf_assets(hf_path, partial / "hf")
        manifest = {**asdict(progress), "layout": _layout(parallel)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    doing = f"{folder}: could not be written"
    try:
        _agreed(parallel, start if parallel.rank == 0 else None, doing)
        with _failing_as(doing, parallel), _signals_held_back():
            # Megatron's own is in a process that it spawns for it, for saves in the background: that imports the running program,
            # which takes 10 s here, and outlives a rank that is killed.
            filesystem_async._results_queue = queue.Queue()
            weights = _weights(policy)
            optimizer = _optimizer_state(policy, weights)
            state = {**weights, "optimizer": optimizer, "rng": _rng_object(parallel, _get_rng_state())}
            dist_checkpointing.save(state, str(partial), content_metadata=dict(METADATA))
        _agreed(parallel, finish if parallel.rank == 0 else None, doing)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk would stay full
        raise


def load_weights(folder: Path, policy: Policy) -> None:
    """Fills the policy from the weights of any checkpoint, converted or saved by a run.

    Raises CheckpointError when it is not one, or one of another model.
    """
    doing = f"{folder}: could not be read"
    _agreed(policy.parallel, lambda: check_model(folder, policy.architecture), doing)
    with _failing_as(doing, policy.parallel):
        _set_weights(policy, _read(folder, _weights(policy)))
    policy.optimizer.reload_model_params()  # the fp32 masters


def load(folder: Path, policy: Policy) -> Progress:
    """Restores all that save() wrote, into any layout: the next update is the one that would have followed.

    Random states are those of ranks, so they are restored only into the layout that they came from.
    """
    doing = f"{folder}: could not be read"
    _agreed(policy.parallel, lambda: check_model(folder, policy.architecture), doing)
    saved_layout = json.loads((folder / MANIFEST).read_text())["layout"]

    with _failing_as(doing, policy.parallel):
        allocate_state(policy.optimizer)
        weights = _weights(policy)
        state = {**weights, "optimizer": _optimizer_state(policy, weights, is_loading=True)}
        if saved_layout == _layout(policy.parallel):
            state["rng"] = _rng_object(policy.parallel, None)
        loaded = _read(folder, state)
        _set_weights(policy, loaded)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        if "rng" in loaded:
            _set_rng_state(loaded["rng"])
    return read_progress(folder)


def read_progress(folder: Path) -> Progress:
    """How far the run was that saved this checkpoint."""
    manifest = json.loads((folder / MANIFEST).read_text())
    values = {field.name: manifest[field.name] for field in fields(Progress)}
    control = values["entropy_control"]
    return Progress(
        **values
        | {
            "entropy_trace": tuple(EntropyPoint(*point) for point in values["entropy_trace"]),
            "entropy_control": None if control is None else EntropyControl(**control),
        }
    )


def newest(checkpoints: Path) -> Path | None:
    """The complete checkpoint of the most steps in a run's checkpoints folder."""
    complete = _complete(checkpoints)
    return complete[-1] if complete else None


def prune(checkpoints: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints, and what interrupted saves left."""
    for old in _complete(checkpoints)[:-keep_last]:
        # Renamed first: a deletion that is interrupted must not leave a folder that looks complete.
        doomed = old.rename(old.with_name(f".{old.name}.partial"))
        shutil.rmtree(doomed, ignore_errors=True)
    for leftover in checkpoints.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def folder_name(step: int) -> str:
    """Name of the checkpoint after so many steps; names sort by step."""
    return f"step_{step:08d}"


def check_model(folder: Path, architecture: Architecture) -> None:
    """Raises CheckpointError unless `folder` is a checkpoint of this model."""
    if not (folder / "metadata.json").exists():
        raise CheckpointError(
            f"{folder}: not a torch_dist checkpoint (no metadata.json). Fix: convert the model with tools/convert_hf_to_megatron.py"
        )
    found = Architecture.from_hf(folder / "hf")
    for field in fields(Architecture):
        ours, theirs = getattr(architecture, field.name), getattr(found, field.name)
        if field.name != "dtype" and ours != theirs:
            raise CheckpointError(
                f"{folder}: holds another model: {field.name} is {theirs}, in model.hf_path {ours}. Fix: model.checkpoint or run.dir"
            )


def _complete(checkpoints: Path) -> list[Path]:
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{MANIFEST}"))


def _weights(policy: Policy) -> dict[str, Any]:
    """The chunks' sharded tensors; without the extra states of layers, which only FP8 uses."""
    return {
        f"model{i}": {
            name: value
            for name, value in model.sharded_state_dict(metadata=dict(METADATA)).items()
            if EXTRA_STATE not in name
        }
        for i, model in enumerate(policy.models)
    }


def _set_weights(policy: Policy, loaded: dict[str, Any]) -> None:
    for i, model in enumerate(policy.models):
        missing, unexpected = model.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in missing if EXTRA_STATE not in name]
        if missing or unexpected:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")


def _optimizer_state(policy: Policy, weights: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
    return policy.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(METADATA))


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)


def _layout(parallel: ParallelState) -> dict[str, int]:
    return {
        "world_size": parallel.world_size,
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "cp": parallel.cp_size,
        "ep": parallel.ep_size,
    }


def _rng_object(parallel: ParallelState, state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("rng", state, (parallel.world_size,), (parallel.rank,))


def _get_rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _agreed(parallel: ParallelState, action: Callable[[], None] | None, doing: str) -> None:
    """Runs `action`, which has no collectives, on the ranks that have one.

    If it fails on any, the first of them raises CheckpointError, and the others PeerFailed.
    """
    error: CheckpointError | None = None
    try:
        if action is not None:
            with _failing_as(doing, parallel):
                action()
    except CheckpointError as failure:
        error = failure
    for rank, reason in enumerate(parallel.gather(None if error is None else str(error))):
        if error is not None and rank == parallel.rank:
            raise error
        if reason is not None:
            raise PeerFailed(reason)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block ends, here and in the processes that it starts.

    Megatron writes files in processes of its own, which a terminal's Ctrl-C reaches, too, and would kill.
    """
    resource_tracker.ensure_running()  # else starting it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _failing_as(doing: str, parallel: ParallelState) -> Iterator[None]:
    """Turns any exception into a CheckpointError at once: peers that wait in a collective are ended by torchrun."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_of_communication(error):  # says nothing about the checkpoint
            raise
        raise CheckpointError(f"{doing} (rank {parallel.rank}: {type(error).__name__}: {error})") from error
