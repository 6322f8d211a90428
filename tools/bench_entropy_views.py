"""What the views of entropy dynamics cost: their share of a real run's steps.

    torchrun --nproc-per-node N tools/bench_entropy_views.py --config FILE [section.key=value ...]

Takes the arguments of megatron_gppo.train, runs it with a stopwatch around the views, and prints rank 0's sums.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from megatron_gppo import train
from megatron_gppo.algorithm import losses

VIEWS = ("gradient_factor", "entropy_dynamics", "ratio_histogram")


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        _synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    return call


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    views: list[float] = []
    steps: list[float] = []
    for name in VIEWS:
        setattr(losses, name, timed(getattr(losses, name), views))
    train.train_step = timed(train.train_step, steps)
    status = train.main(sys.argv[1:])
    if steps and os.environ["RANK"] == "0":
        share = sum(views) / sum(steps)
        print(f"{len(steps)} steps: {sum(steps):.2f} s, of these views {sum(views):.3f} s = {share:.2%}")
    return status


if __name__ == "__main__":
    sys.exit(main())
