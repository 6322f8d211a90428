"""The values that an update is made with: schedules looked up, warm-up applied, and the entropy controller obeyed."""

import math
from dataclasses import dataclass

from megatron_gppo.algorithm.entropy_control import EntropyControl, betas
from megatron_gppo.config import Config, LossConfig
from megatron_gppo.schedules import Schedule, value_at


@dataclass(frozen=True, slots=True)
class InForce:
    """Values of one update. Only lr differs between the updates of a step."""

    loss: LossConfig
    lr: float
    entropy_target: float | None  # nats; None without a controller


def values_in_force(config: Config, step: int, updates: range, control: EntropyControl | None) -> list[InForce]:
    """One for each update of a step. Steps count from 1, updates from 0 over the run; control is as the step before left it.

    A function of its arguments: a resumed run goes on with the values that it would have had.
    """
    loss = config.algorithm.at(step)
    target = None
    if config.algorithm.entropy_target is not None:
        beta1, beta2 = betas(config.algorithm, control)
        loss = loss.model_copy(update={"beta1": beta1, "beta2": beta2})
        target = value_at(config.algorithm.entropy_target.target, step)
    return [InForce(loss, learning_rate(config, step, update), target) for update in updates]


def learning_rate(config: Config, step: int, update: int) -> float:
    """Of an update, counted from 0 over the run.

    In a warm-up of W updates it is peak * (k + 1) / (W + 1): the first update already moves. From update W on a peak that
    is a number decays, as optimizer.schedule says, towards min_lr, which the update after the run's last would have.
    """
    settings = config.optimizer
    peak, warmup = settings.peak_lr(step), settings.warmup_updates
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if isinstance(settings.lr, Schedule) or settings.schedule == "constant":
        return peak
    total = max(config.train.steps * config.updates_per_step, warmup + 1)
    done = min((update - warmup) / (total - warmup), 1.0)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.min_lr + left * (peak - settings.min_lr)
