"""Runs a function on several gloo ranks, each a process of its own, and collects what they return."""

import gc
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# Imported once, by the process that all ranks are forked from: importing Megatron takes longer than most tests' computation.
PRELOADED = ["tests.support.policy"]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300) -> list[Any]:
    """Calls ``function(rank, *args)`` on ``world_size`` processes that share a gloo default group.

    Each process has one thread. ``function`` must be importable (defined at a module's top level), and its arguments and
    results picklable. Processes meet in a file, so several calls can run side by side without a free port to fight over.

    Returns the results in order of rank. Raises RuntimeError with all exit codes and the traceback of the rank that
    failed first, and TimeoutError when the ranks are not done after ``timeout_s`` seconds. No process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="run_ranks_") as folder:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        processes = [
            context.Process(
                target=_run_rank, args=(rank, world_size, folder, timeout_s, function, args), name=f"rank {rank}"
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    """Returns when all have ended well; raises as soon as one has not: its peers may be waiting for it for ever."""
    while True:
        codes = [process.exitcode for process in processes]
        if any(code not in (None, 0) for code in codes):
            raise RuntimeError(_describe_failure(folder, codes))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            raise TimeoutError(f"ranks {running} of {len(codes)} were still running when the time was up")
        time.sleep(0.01)


def _describe_failure(folder: Path, codes: list[int | None]) -> str:
    """Exit codes, and the earliest traceback: later ones mostly say that a peer has gone away."""
    message = f"exit codes by rank: {codes}"
    tracebacks = sorted(folder.glob("failure_*"), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks:
        rank = tracebacks[0].name.removeprefix("failure_")
        message += f"; rank {rank} failed first:\n{tracebacks[0].read_text()}"
    return message


def _run_rank(
    rank: int, world_size: int, folder: str, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported need not be searched for garbage
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(rank, *args)
        # Pickled as bytes: tensors sent through a multiprocessing queue would pass by file descriptors of a process that ends.
        (Path(folder) / f"result_{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        # Renamed when complete: the parent may look while it is being written.
        partial = Path(folder) / f"partial_{rank}"
        partial.write_text(traceback.format_exc())
        partial.rename(Path(folder) / f"failure_{rank}")
        raise SystemExit(1) from None
