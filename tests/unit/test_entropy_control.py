"""The entropy controller: which way, how far, and that it holds a system of the kind it is made for at its target."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gppo.algorithm import EntropyControl, after_step
from megatron_gppo.algorithm.entropy_control import betas
from megatron_gppo.config import AlgorithmConfig
from megatron_gppo.datatypes import UpdateStats


def algorithm(**entropy_target: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"preset": "paper", "entropy_target": {"target": 0.4, **entropy_target}})


def measured(*entropies: float, num_tokens: int = 10) -> list[UpdateStats]:
    """Updates of these mean entropies."""
    return [
        UpdateStats({"entropy": value * num_tokens}, {}, [], num_tokens, 0.0, 1.0, 1e-6, False) for value in entropies
    ]


NO_TOKENS = UpdateStats({}, {}, [], 0, loss=0.0, grad_norm=0.0, lr=1e-6, skipped=True)


def test_off_by_default() -> None:
    config = AlgorithmConfig.model_validate({"preset": "paper"})
    assert after_step(config, None, 1, measured(0.3)) is None


def test_by_hand() -> None:
    config = algorithm(gain=0.5, integral_steps=10, max_change=1.0)
    first = after_step(config, None, 1, measured(0.3, 0.4))
    share = 0.5 * (0.125 + 0.0125)
    assert first == EntropyControl(pytest.approx(0.5 - share), 1.0, pytest.approx(0.0125))
    second = after_step(config, first, 2, measured(0.5))
    share = 0.5 * (-0.25 + (0.0125 - 0.025))
    beta2 = pytest.approx(1.0 + share * 0.5)  # whose range is half as wide
    assert second == EntropyControl(pytest.approx(0.5 - share), beta2, pytest.approx(-0.0125))


def test_no_step_moves_a_beta_by_more_than_max_change() -> None:
    control = after_step(algorithm(max_change=0.05), None, 1, measured(4.0))
    assert control == EntropyControl(pytest.approx(0.55), pytest.approx(0.975), pytest.approx(-9 / 50))


def test_the_integral_stops_where_it_alone_would_cover_the_ranges() -> None:
    config, control = algorithm(gain=2.0, integral_steps=1.0), None
    for step in range(1, 100):
        control = after_step(config, control, step, measured(0.1))
    assert control == EntropyControl(beta1=0.0, beta2=1.0, integral=0.5)


def test_too_little_entropy_lowers_beta1_and_raises_beta2() -> None:
    config = algorithm(beta2=[0.5, 1.5])
    low, high = after_step(config, None, 1, measured(0.2)), after_step(config, None, 1, measured(0.8))
    assert low is not None
    assert high is not None
    assert low.beta1 < 0.5 < high.beta1
    assert low.beta2 > 1.0 > high.beta2


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_gentle_and_within_its_ranges(entropies: list[float], max_change: float) -> None:
    config = algorithm(beta1=[0.25, 0.75], beta2=[0.5, 1.5], gain=5.0, max_change=max_change)
    control = None
    for step, entropy in enumerate(entropies, start=1):
        before = betas(config, control)
        control = after_step(config, control, step, measured(entropy))
        beta1, beta2 = betas(config, control)
        assert 0.25 <= beta1 <= 0.75
        assert 0.5 <= beta2 <= 1.5
        assert abs(beta1 - before[0]) <= max_change * 0.5 + 1e-12
        assert abs(beta2 - before[1]) <= max_change * 1.0 + 1e-12


@pytest.mark.parametrize("updates", [[], [NO_TOKENS], measured(math.nan), measured(math.inf, 0.4)])
def test_a_step_without_a_measurement_changes_nothing(updates: list[UpdateStats]) -> None:
    config = algorithm()
    control = EntropyControl(0.3, 0.9, integral=0.1)
    assert after_step(config, control, 5, updates) == control
    assert after_step(config, None, 1, updates) == EntropyControl(0.5, 1.0, integral=0.0)


def test_equal_bounds_pin_a_beta() -> None:
    control = after_step(algorithm(beta2=[1.0, 1.0]), None, 1, measured(0.8))
    assert control is not None
    assert control.beta2 == 1.0
    assert control.beta1 > 0.5


def test_a_target_curve_is_followed() -> None:
    config = algorithm(target={"piecewise_constant": {1: 0.4, 3: 0.2}})
    too_low, too_high = after_step(config, None, 2, measured(0.3)), after_step(config, None, 3, measured(0.3))
    assert too_low is not None
    assert too_high is not None
    assert too_low.beta1 < 0.5 < too_high.beta1


@pytest.mark.parametrize("start", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("drift", [-0.006, 0.0, 0.004])
def test_holds_a_system_in_which_betas_set_the_rate_of_change(start: float, drift: float) -> None:
    """Entropy that drifts by itself, changes the faster the further the betas are from the middle, and is measured with
    noise of 2%: it comes to within 5% of the target and stays there."""
    config = algorithm(beta2=[0.5, 1.5])
    control, entropy = None, start
    late = []
    for step in range(1, 401):
        beta1, beta2 = betas(config, control)
        entropy = max(entropy + drift + 0.02 * ((0.5 - beta1) + (beta2 - 1.0)) / 2, 0.0)
        noise = 1.0 + 0.02 * math.sin(12.9898 * step)
        control = after_step(config, control, step, measured(entropy * noise))
        if step > 300:
            late.append(entropy)
    assert max(abs(entropy - 0.4) for entropy in late) < 0.05 * 0.4
