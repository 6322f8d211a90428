"""Ranks that stall, fail or vanish: what the others say, and that they end. Real processes, store and gloo; no model."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_gppo import watchdog as watchdog_module
from megatron_gppo.config import Config
from megatron_gppo.interrupts import Interrupts
from megatron_gppo.job import join_job
from megatron_gppo.parallel import PeerFailed
from megatron_gppo.policy import initialize_distributed
from megatron_gppo.rollout.ports import number_of, reserve_port
from megatron_gppo.watchdog import PeerGone, Watchdog, limits
from tests.support.rollout import make_config

STALL_S = 3.0

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])

Rank = Callable[[Watchdog, int], None]


def config(folder: Path) -> Config:
    made = make_config(folder / "no-model", folder / "run", request_timeout_s=0.1, max_retries=0)
    run = made.run.model_copy(update={"stall_timeout_s": STALL_S, "collective_timeout_s": 60.0})
    return made.model_copy(update={"run": run})


def run_rank(rank: int, port: int, folder: Path, function: Rank) -> None:
    """One rank: its output in folder/rank_N.log, its exit status 0 when function returned, 1 for what train reports so."""
    log = (folder / f"rank_{rank}.log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    watchdog_module.REPORT_S, watchdog_module.LEAVE_S = 4.0, 2.0
    of_run = config(folder)
    job = join_job(of_run)
    with Watchdog(of_run, job) as watchdog, watchdog.naming_failures():
        initialize_distributed(of_run, job)
        watchdog.enter("train", "update 3")
        function(watchdog, rank)
        dist.barrier()


def run_two(function: Rank, folder: Path, within_s: float = 60) -> tuple[list[int | None], list[str]]:
    """Exit statuses and outputs of two ranks."""
    with reserve_port("127.0.0.1") as port:
        ranks = [
            processes.Process(target=run_rank, args=(rank, number_of(port), folder, function)) for rank in range(2)
        ]
        deadline = time.monotonic() + within_s
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            outputs = [(folder / f"rank_{rank}.log").read_text() for rank in range(2)]
            return [process.exitcode for process in ranks], outputs
        finally:
            for process in ranks:
                process.kill()


def sleep_in_a_reward() -> None:
    time.sleep(100)


def stall_on_rank_1(watchdog: Watchdog, rank: int) -> None:
    if rank == 1:
        sleep_in_a_reward()


def test_a_stall_shows_every_ranks_phase_and_stack(tmp_path: Path) -> None:
    """Rank 1 sleeps, rank 0 is blocked in a collective, and does not return to Python."""
    statuses, outputs = run_two(stall_on_rank_1, tmp_path)
    assert statuses == [1, 1], outputs
    for rank, line in ((0, "dist.barrier()"), (1, "sleep_in_a_reward()")):
        kept = (tmp_path / "run" / "stalls" / f"rank_{rank}.txt").read_text()
        assert f"rank {rank}, phase 'train' (update 3), for" in kept
        assert line in kept
        assert kept in outputs[rank]
        assert "no progress for 3 s; all 2 ranks have reported" in outputs[rank]


def hold_the_lock_on_rank_1(watchdog: Watchdog, rank: int) -> None:
    if rank == 1:
        ctypes.PyDLL(None).sleep(100)  # no thread of this process can run meanwhile


def test_a_rank_that_cannot_run_its_threads_is_named(tmp_path: Path) -> None:
    statuses, outputs = run_two(hold_the_lock_on_rank_1, tmp_path)
    assert statuses == [1, 1], outputs
    assert "no report from rank 1 (" in outputs[0]
    assert "hold_the_lock_on_rank_1" in outputs[1], "faulthandler's stacks"


def move_on_rank_0(watchdog: Watchdog, rank: int) -> None:
    watchdog.enter("rollout")
    if rank == 0:
        for _ in range(10):
            time.sleep(STALL_S / 5)
            watchdog.progress("rollout")
            watchdog.progress("another phase")


def test_who_waits_for_a_rank_that_moves_on_does_not_stall(tmp_path: Path) -> None:
    statuses, outputs = run_two(move_on_rank_0, tmp_path)
    assert statuses == [0, 0], outputs
    assert not (tmp_path / "run" / "stalls").exists()


def progress_of_another_phase(watchdog: Watchdog, rank: int) -> None:
    while True:
        time.sleep(0.1)
        watchdog.progress("rollout")


def test_what_goes_on_beside_a_phase_does_not_hide_its_stall(tmp_path: Path) -> None:
    statuses, outputs = run_two(progress_of_another_phase, tmp_path)
    assert statuses == [1, 1], outputs


def stop_a_rank_that_waits(watchdog: Watchdog, rank: int) -> None:
    asked = threading.Event()
    watchdog.when_asked_to_stop(asked.set)
    with Interrupts(watchdog.ask_to_stop) as interrupts:
        dist.barrier()  # gloo connects in the first collective
        if rank == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            while not asked.wait(STALL_S / 5):  # rank 1 waits in a collective, where no handler of Python's runs
                watchdog.progress("train")
        dist.barrier()
    assert interrupts.requested == (signal.SIGTERM if rank == 1 else None)


def test_a_rank_that_waits_in_a_collective_can_ask_to_stop(tmp_path: Path) -> None:
    statuses, outputs = run_two(stop_a_rank_that_waits, tmp_path)
    assert statuses == [0, 0], outputs


def vanish_from_a_collective(watchdog: Watchdog, rank: int) -> None:
    dist.barrier()  # gloo connects in the first collective, and would wait there for a rank that never comes
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerGone), watchdog.naming_failures():
        dist.all_reduce(torch.ones(1))
    raise PeerFailed


def test_a_failed_collective_names_phase_and_peer(tmp_path: Path) -> None:
    statuses, outputs = run_two(vanish_from_a_collective, tmp_path)
    assert statuses == [1, -signal.SIGKILL], outputs
    assert "error: rank 0, phase 'train' (update 3): gone: rank 1 (" in outputs[0]
    assert ", 127.0.0.1)" in outputs[0]


def vanish_outside_of_a_collective(watchdog: Watchdog, rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.1)
        watchdog.progress("train")


def test_a_rank_that_vanished_is_missed(tmp_path: Path) -> None:
    statuses, outputs = run_two(vanish_outside_of_a_collective, tmp_path)
    assert statuses == [1, -signal.SIGKILL], outputs
    assert "rank 1 (" in outputs[0]
    assert "not heard of for 3 s" in outputs[0]


def fail_on_rank_1(watchdog: Watchdog, rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    while True:
        time.sleep(0.1)
        watchdog.progress("train")


def test_who_does_not_notice_that_another_rank_failed_is_ended(tmp_path: Path) -> None:
    statuses, outputs = run_two(fail_on_rank_1, tmp_path)
    assert statuses == [1, 1], outputs
    assert "the run has ended: rank 1, phase 'train' (update 3): ValueError: the reason" in outputs[0]
    assert "Traceback" in outputs[1], "a bug keeps its traceback"


def store_ends(watchdog: Watchdog, rank: int) -> None:
    """Rank 0 has the store here."""
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(0.1)
            watchdog.progress("train")


def test_a_store_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    statuses, outputs = run_two(store_ends, tmp_path)
    assert statuses == [-signal.SIGKILL, 1], outputs
    assert "the run has ended: the rendezvous store at 127.0.0.1:" in outputs[1]


def test_what_has_a_limit_of_its_own_gets_it_first(tmp_path: Path) -> None:
    of_run = config(tmp_path)
    assert limits(of_run)["rollout"] == STALL_S + 0.1 + of_run.rollout.start_timeout_s
    assert limits(of_run)["sync"] == STALL_S + of_run.sync.timeout_s + of_run.rollout.start_timeout_s
    assert limits(of_run)["checkpoint"] == STALL_S + 60


def test_what_stands_still_before_a_rank_joins_ends_it(tmp_path: Path) -> None:
    code = (
        "import time\nfrom megatron_gppo.watchdog import ended_if_late\n"
        "def in_time():\n    with ended_if_late('first', 0.2): pass\n    time.sleep(0.5)\n"
        "def download():\n    time.sleep(60)\n"
        "in_time()\nwith ended_if_late('second', 0.5): download()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "stall: second: not done after 0.5 s" in done.stderr
    assert "in download" in done.stderr
