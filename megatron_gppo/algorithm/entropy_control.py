"""Holds the policy's entropy near a target by moving beta1 and beta2 within bounds, once a step.

Entropy falls faster with a larger beta1 and slower with a larger beta2 (arXiv 2509.20712, Sections 3.2 and 5.1), so both are
moved together, away from where they are configured: beta1 down and beta2 up by the same share of their ranges,

    share = gain * (error + integral)          error = (target - entropy) / target
    integral = sum of error / integral_steps over the steps so far, kept within +-1 / gain

a proportional-integral controller: beta sets how fast entropy changes, so the proportional part alone brings it back
without swinging, and the integral removes the error that stays. No step moves a beta by more than max_change of its range,
so noise in one step's entropy, and a jump of the target, come through gently.
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
    integral: float


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
    return EntropyControl(*_start(config), integral=0.0)


def _start(config: AlgorithmConfig) -> tuple[float, float]:
    assert isinstance(config.beta1, float)
    assert isinstance(config.beta2, float)
    return config.beta1, config.beta2


def _steer(config: AlgorithmConfig, before: EntropyControl, step: int, entropy: float) -> EntropyControl:
    settings = config.entropy_target
    assert settings is not None
    target = value_at(settings.target, step)
    error = (target - entropy) / target
    integral = _within(before.integral + error / settings.integral_steps, (-1.0 / settings.gain, 1.0 / settings.gain))
    share = settings.gain * (error + integral)

    def moved(now: float, start: float, share: float, bounds: tuple[float, float]) -> float:
        width = bounds[1] - bounds[0]
        largest = settings.max_change * width
        return _within(_within(start + share * width, bounds), (now - largest, now + largest))

    (beta1, beta2), (start1, start2) = betas(config, before), _start(config)
    return EntropyControl(
        beta1=moved(beta1, start1, -share, settings.beta1),
        beta2=moved(beta2, start2, share, settings.beta2),
        integral=integral,
    )


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
