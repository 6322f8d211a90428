"""Holds the policy's entropy near a target by moving beta1 and beta2 within bounds, once a step.

Entropy falls faster with a larger beta1 and slower with a larger beta2 (arXiv 2509.20712, Sections 3.2 and 5.1), so both are
moved together: too little entropy lowers beta1 and raises beta2, each by the same share of its range. With the relative
error e = (target - entropy) / target, a step moves them by

    gain * (e - e of the step before + e / integral_steps)       at most max_change either way, and never out of the ranges

which is a proportional-integral controller in its incremental form: beta sets how fast entropy changes, so the
proportional part damps, and the integral part removes the error that stays. It starts at the configured betas without a
jump, and has nothing to unwind after a time at a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gppo.config import AlgorithmConfig
from megatron_gppo.datatypes import UpdateStats
from megatron_gppo.schedules import value_at


@dataclass(frozen=True, slots=True)
class EntropyControl:
    """What the controller carries from one step to the next, and through checkpoints."""

    beta1: float  # of the next step
    beta2: float
    error: float | None  # e of the last step that was measured


def after_step(
    config: AlgorithmConfig, control: EntropyControl | None, step: int, updates: Sequence[UpdateStats]
) -> EntropyControl | None:
    """The controller after a step, given its state before (None at the start). None when there is no entropy_target.

    A step without a loss token, or whose entropy is not a finite number, changes nothing.
    """
    if config.entropy_target is None:
        return None
    before = control or _at_start(config)
    num_tokens = sum(update.num_loss_tokens for update in updates)
    total = sum(update.sums["entropy"] for update in updates if update.num_loss_tokens > 0)
    if num_tokens == 0 or not math.isfinite(total):
        return before
    return _steer(config, before, step, total / num_tokens)


def betas(config: AlgorithmConfig, control: EntropyControl | None) -> tuple[float, float]:
    """beta1 and beta2 of the next step, within the configured ranges, which may have changed since a checkpoint."""
    assert config.entropy_target is not None
    now = control or _at_start(config)
    return _within(now.beta1, config.entropy_target.beta1), _within(now.beta2, config.entropy_target.beta2)


def _at_start(config: AlgorithmConfig) -> EntropyControl:
    assert isinstance(config.beta1, float)
    assert isinstance(config.beta2, float)
    return EntropyControl(config.beta1, config.beta2, error=None)


def _steer(config: AlgorithmConfig, before: EntropyControl, step: int, entropy: float) -> EntropyControl:
    settings = config.entropy_target
    assert settings is not None
    target = value_at(settings.target, step)
    error = (target - entropy) / target
    rise = error - before.error if before.error is not None else 0.0
    change = settings.gain * (rise + error / settings.integral_steps)
    change = min(max(change, -settings.max_change), settings.max_change)
    beta1, beta2 = betas(config, before)
    return EntropyControl(
        beta1=_within(beta1 - change * (settings.beta1[1] - settings.beta1[0]), settings.beta1),
        beta2=_within(beta2 + change * (settings.beta2[1] - settings.beta2[0]), settings.beta2),
        error=error,
    )


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
