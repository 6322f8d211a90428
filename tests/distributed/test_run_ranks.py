"""The test support itself: results by rank, and failures that name their rank instead of hanging."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import run_ranks


def sum_of_ranks(rank: int, offset: int) -> tuple[int, float]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, total.item()


def raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("lost")
    dist.barrier()


def die_on_rank_1(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def sleep(rank: int) -> None:
    time.sleep(600)


def test_results_by_rank() -> None:
    assert run_ranks(2, sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_failure_shows_the_traceback_of_its_rank() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed first.*raise_on_rank_1.*KeyError: 'lost'"):
        run_ranks(2, raise_on_rank_1)


def test_death_without_a_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes by rank: \[.*3\]"):
        run_ranks(2, die_on_rank_1)


def test_time_is_limited() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_ranks(2, sleep, timeout_s=1)
