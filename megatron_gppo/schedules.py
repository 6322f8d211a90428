"""Values that change over the steps of a run: given by points, with a rule for what lies between them.

beta1: 0.5                                             a number: the same in every step
beta1: {piecewise_constant: {1: 0, 585: 0.5}}          0 until step 584, 0.5 from step 585 on
clip_high: {linear: {1: 0.2, 500: 0.28}}               straight from 0.2 to 0.28, and 0.28 from then on
entropy_coef: {cosine: {100: 0.01, 1000: 0}}           0.01 until step 100, then half a cosine wave down to 0
"""

import math
from bisect import bisect_right
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_serializer, model_validator

Value = TypeVar("Value")
Step = Annotated[int, Field(ge=0)]
Shape = Literal["piecewise_constant", "linear", "cosine"]

# The two forms, as pydantic's errors name them.
NUMBER, SCHEDULE = "a number", "a schedule"


class Schedule(BaseModel, Generic[Value]):
    """Points {step: value}, at least two, under the one of the three names that says how to get from each to the next.

    Steps count from 1. Before the first point its value holds, after the last one that one's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    piecewise_constant: dict[Step, Value] | None = None
    """Each value holds from its step to the one before the next point."""
    linear: dict[Step, Value] | None = None
    """Straight lines between the points."""
    cosine: dict[Step, Value] | None = None
    """Half a cosine wave between the points: level at both ends."""

    @model_validator(mode="before")
    @classmethod
    def _one_shape(cls, given: Any) -> Any:
        if isinstance(given, dict):
            names = list(given)
            if len(names) != 1 or names[0] not in get_args(Shape):
                raise ValueError(
                    f"{given} is not a schedule. Fix: a number, or {{SHAPE: {{step: value, step: value, ...}}}} "
                    f"with one SHAPE of {', '.join(get_args(Shape))}"
                )
        return given

    @model_validator(mode="after")
    def _points(self) -> "Schedule[Value]":
        if len(self.points) < 2:
            raise ValueError(
                f"{self.shape} has {len(self.points)} of at least 2 points. Fix: add a step, or give the number alone"
            )
        return self

    def __repr__(self) -> str:
        return f"{{{self.shape}: {self.points}}}"

    @property
    def shape(self) -> Shape:
        return next(shape for shape in get_args(Shape) if getattr(self, shape) is not None)

    @property
    def points(self) -> dict[int, Any]:
        """Value by step, in order of steps."""
        return dict(sorted(getattr(self, self.shape).items()))

    @property
    def values(self) -> list[float]:
        """The points' values; all others lie between them."""
        return list(self.points.values())

    def at(self, step: int) -> float:
        """The value in a step, counted from 1."""
        steps, values = list(self.points), self.values
        after = bisect_right(steps, step)  # index of the first point that is still to come
        if after in (0, len(steps)):
            return float(values[0 if after == 0 else -1])
        start, end = values[after - 1], values[after]
        progress = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        match self.shape:
            case "piecewise_constant":
                return float(start)
            case "linear":
                share = progress
            case "cosine":
                share = (1.0 - math.cos(math.pi * progress)) / 2.0
        return float(start + (end - start) * share)

    @model_serializer
    def _as_written(self) -> dict[str, dict[int, float]]:
        return {self.shape: self.points}


def _form(given: Any) -> str:
    return SCHEDULE if isinstance(given, dict | Schedule) else NUMBER


# Marks a union of Annotated[N, Tag(NUMBER)] and Annotated[Schedule[N], Tag(SCHEDULE)]: a number or a schedule of such.
NUMBER_OR_SCHEDULE = Discriminator(_form)


def value_at(value: float | Schedule[float], step: int) -> float:
    """The value in a step, of a field that may be a number or a schedule."""
    return value.at(step) if isinstance(value, Schedule) else value
