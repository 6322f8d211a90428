"""What the views of entropy dynamics cost: their share of a real run's steps.

    torchrun --nproc-per-node N tools/bench_entropy_views.py --config FILE [section.key=value ...]

Takes the arguments of megatron_gppo.train, and runs it with a stopwatch around all that is computed of a micro-batch beside
its loss, and around making scalars and histograms of it and writing them to TensorBoard. Prints the sums of each rank that
has any. The entropy itself is not counted: it comes with the log-probs.
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
from megatron_gppo.metrics import MetricsLogger

VIEWS = {
    losses: ("_metrics", "gradient_factor", "entropy_dynamics", "ratio_histogram"),
    train: ("step_scalars", "step_histograms"),
    MetricsLogger: ("log_step",),
}


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
    for place, names in VIEWS.items():
        for name in names:
            setattr(place, name, timed(getattr(place, name), views))
    train.train_step = timed(train.train_step, steps)
    status = train.main(sys.argv[1:])
    if steps and views:
        share = sum(views) / sum(steps)
        rank = os.environ["RANK"]
        print(f"rank {rank}: {len(steps)} steps: {sum(steps):.2f} s, of these views {sum(views):.3f} s = {share:.2%}")
    return status


if __name__ == "__main__":
    sys.exit(main())
