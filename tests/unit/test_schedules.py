"""Schedules: their shapes, what they are at every step, and how they are written and read."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_gppo.schedules import Schedule, value_at

SHAPES = ["piecewise_constant", "linear", "cosine"]
points_of_a_schedule = st.dictionaries(st.integers(0, 1000), st.floats(-10, 10), min_size=2, max_size=6)


def schedule(shape: str, points: dict[int, float]) -> Schedule[float]:
    return Schedule[float].model_validate({shape: points})


def test_the_papers_schedule() -> None:
    """beta1 0 -> 0.5 at step 585 (arXiv 2509.20712, Section 5.2)."""
    beta1 = schedule("piecewise_constant", {1: 0.0, 585: 0.5})
    assert [beta1.at(step) for step in (1, 2, 584, 585, 586, 1000)] == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("piecewise_constant", [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]),
        ("linear", [1.0, 1.0, 1.5, 2.0, 3.0, 3.0]),
        ("cosine", [1.0, 1.0, 2 - math.sqrt(0.5), 2.0, 3.0, 3.0]),
    ],
)
def test_between_and_outside_of_the_points(shape: str, expected: list[float]) -> None:
    values = schedule(shape, {10: 1.0, 50: 3.0})
    assert [values.at(step) for step in (1, 10, 20, 30, 50, 90)] == pytest.approx(expected)


@settings(deadline=None)
@given(st.sampled_from(SHAPES), points_of_a_schedule, st.integers(0, 1100))
def test_properties(shape: str, points: dict[int, float], step: int) -> None:
    values = schedule(shape, points)
    for at, value in points.items():
        assert values.at(at) == value
    neighbours = [points[max((s for s in points if s <= step), default=min(points))]]
    neighbours.append(points[min((s for s in points if s >= step), default=max(points))])
    slack = 1e-12 * max(abs(value) for value in neighbours)
    assert min(neighbours) - slack <= values.at(step) <= max(neighbours) + slack, (
        "between its neighbours, monotonically"
    )
    if shape == "piecewise_constant":
        assert values.at(step) in points.values()


@settings(deadline=None)
@given(st.sampled_from(SHAPES), points_of_a_schedule)
def test_order_does_not_matter_and_what_is_written_is_read(shape: str, points: dict[int, float]) -> None:
    values = schedule(shape, points)
    backwards = schedule(shape, dict(reversed(points.items())))
    written = yaml.safe_load(yaml.safe_dump(values.model_dump(mode="json")))
    again = Schedule[float].model_validate(written)
    for step in range(0, 1100, 37):
        assert values.at(step) == backwards.at(step) == again.at(step)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "one SHAPE of piecewise_constant, linear, cosine"),
        ({"liner": {1: 0.0, 2: 1.0}}, "is not a schedule"),
        ({"linear": {1: 0.0, 2: 1.0}, "cosine": {1: 0.0, 2: 1.0}}, "is not a schedule"),
        ({"linear": {1: 0.0}}, "linear has 1 of at least 2 points"),
        ({"linear": [0.0, 1.0]}, "valid dictionary"),
        ({"linear": {-1: 0.0, 2: 1.0}}, "greater than or equal to 0"),
        ({"linear": {1.5: 0.0, 2: 1.0}}, "valid integer"),
        ({"linear": {1: "much", 2: 1.0}}, "valid number"),
    ],
)
def test_mistakes(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Schedule[float].model_validate(given)


def test_a_number_is_the_same_at_every_step() -> None:
    assert value_at(0.5, 1) == value_at(0.5, 1000) == 0.5
