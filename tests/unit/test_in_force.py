"""What an update is made with: schedules looked up by step, the learning rate by update, betas from the controller."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.algorithm import EntropyControl, values_in_force
from megatron_gppo.algorithm.in_force import learning_rate
from megatron_gppo.config import Config
from tests.support.policy import make_config

W, LR = 3, 4e-3


def config_with(algorithm: dict[str, Any] | None = None, **optimizer: Any) -> Config:
    """4 steps of 2 updates."""
    settings = {"lr": LR, "warmup_updates": W, **optimizer}
    return make_config(Path("model"), algorithm=algorithm or {}, optimizer=settings)


def test_every_value_that_may_be_scheduled() -> None:
    algorithm = {
        "beta1": {"piecewise_constant": {1: 0.0, 3: 0.5}},
        "beta2": {"linear": {1: 1.0, 3: 0.5}},
        "clip_low": {"linear": {1: 0.1, 3: 0.3}},
        "clip_high": {"cosine": {1: 0.2, 3: 0.4}},
        "entropy_coef": {"linear": {1: 0.01, 3: 0.0}},
    }
    config = config_with(algorithm, lr={"linear": {1: 1e-3, 3: 3e-3}}, warmup_updates=0)
    by_step = [values_in_force(config, step, range(1), None)[0] for step in (1, 2, 3, 4)]
    values = [
        (now.loss.beta1, now.loss.beta2, now.loss.clip_low, now.loss.clip_high, now.loss.entropy_coef, now.lr)
        for now in by_step
    ]
    assert values == [
        pytest.approx((0.0, 1.0, 0.1, 0.2, 0.01, 1e-3)),
        pytest.approx((0.0, 0.75, 0.2, 0.3, 0.005, 2e-3)),
        pytest.approx((0.5, 0.5, 0.3, 0.4, 0.0, 3e-3)),
        pytest.approx((0.5, 0.5, 0.3, 0.4, 0.0, 3e-3)),
    ]
    assert by_step[0].entropy_target is None


def test_one_for_each_update_of_the_step() -> None:
    values = values_in_force(config_with(), step=2, updates=range(2, 5), control=None)
    assert [now.lr for now in values] == pytest.approx([LR * 3 / 4, LR, LR])
    assert values_in_force(config_with(), step=2, updates=range(2, 2), control=None) == []


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3]),
        ("linear", [1e-3, 2e-3, 3e-3, *(1e-3 + 3e-3 * (1 - k / 5) for k in range(6)), 1e-3]),
        ("cosine", [1e-3, 2e-3, 3e-3, *(1e-3 + 1.5e-3 * (1 + math.cos(math.pi * k / 5)) for k in range(6)), 1e-3]),
    ],
)
def test_decay_over_the_updates_of_the_run(schedule: str, expected: list[float]) -> None:
    """8 updates, 3 of them warm-up; a run that was made longer on resuming stays at the end."""
    config = config_with(schedule=schedule, min_lr=1e-3)
    assert [learning_rate(config, 1, update) for update in range(10)] == pytest.approx(expected)


def test_warm_up_scales_a_schedule_over_steps() -> None:
    config = config_with(lr={"piecewise_constant": {1: 1e-3, 2: 4e-3}})
    assert learning_rate(config, step=1, update=0) == pytest.approx(1e-3 / 4)
    assert learning_rate(config, step=2, update=2) == pytest.approx(4e-3 * 3 / 4)
    assert learning_rate(config, step=2, update=3) == 4e-3


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(0, 30), st.floats(1e-9, 1.0), st.sampled_from(["constant", "linear", "cosine"]))
def test_the_first_update_moves_and_none_exceeds_the_peak(warmup: int, update: int, lr: float, schedule: str) -> None:
    config = config_with(lr=lr, warmup_updates=warmup, schedule=schedule)
    assert learning_rate(config, 1, 0) > 0
    assert 0 <= learning_rate(config, 1, update) <= lr
    if update < warmup:
        assert learning_rate(config, 1, update) < learning_rate(config, 1, update + 1)


def test_the_controllers_betas_replace_the_configured_ones() -> None:
    config = config_with({"entropy_target": {"target": {"linear": {1: 0.4, 3: 0.2}}}})
    start = values_in_force(config, 1, range(1), None)[0]
    assert (start.loss.beta1, start.loss.beta2, start.entropy_target) == (0.5, 1.0, 0.4)
    moved = values_in_force(config, 2, range(1), EntropyControl(0.25, 0.75, integral=0.1))[0]
    assert (moved.loss.beta1, moved.loss.beta2) == (0.25, 0.75)
    assert moved.entropy_target == pytest.approx(0.3)
    narrowed = config_with({"entropy_target": {"target": 0.4, "beta1": [0.4, 0.6], "beta2": [1, 1]}})
    inside = values_in_force(narrowed, 2, range(1), EntropyControl(0.25, 0.75, integral=0.1))[0].loss
    assert (inside.beta1, inside.beta2) == (0.4, 1.0), "ranges that changed on resuming hold"
    switched_off = values_in_force(config_with(), 2, range(1), EntropyControl(0.25, 0.75, integral=0.1))[0].loss
    assert (switched_off.beta1, switched_off.beta2) == (0.5, 1.0)
