"""What k sampled responses a problem say of a model, with 95% confidence intervals over problems.

The problems are the sample: a benchmark stands for all problems like its own, and responses to one problem are not
independent observations. So every quantity is first one number a problem, and intervals are Student's t over these.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
QUADRATURE_POINTS = 4001


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95% confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference over problems, its 95% confidence interval, and the two-sided p-value of "there is none"."""

    problems: int
    mean: float
    low: float
    high: float
    p_value: float

    @property
    def significant(self) -> bool:
        return self.p_value < 1 - CONFIDENCE


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """Unbiased estimate, from n samples, of the chance that one of k is correct (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_correct(correct: Sequence[bool], answers: Sequence[str | None]) -> float:
    """maj@k: 1 if the most frequent answer is correct, 0 if not; of m equally frequent ones each counts 1/m.

    Correct responses vote together, however they write the answer, wrong ones by their text; no answer is no vote.
    """
    votes: Counter[str | None] = Counter()  # None: the correct answer
    for is_correct, answer in zip(correct, answers, strict=True):
        if is_correct or answer is not None:
            votes[None if is_correct else answer] += 1
    most = max(votes.values(), default=0)
    return 1.0 / sum(count == most for count in votes.values()) if votes[None] == most > 0 else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value in [0, 1] a problem."""
    mean, half = _mean_and_half_width(values)
    n = len(values)
    if half == 0 and mean in (0.0, 1.0):
        # No variation says little about few problems: the exact interval of 0 or n successes in n trials.
        edge = ((1 - CONFIDENCE) / 2) ** (1 / n)
        return Estimate(mean, edge, 1.0) if mean == 1.0 else Estimate(mean, 0.0, 1.0 - edge)
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """second - first, on the same problems."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean, half = _mean_and_half_width(differences)
    if n < 2 or half == 0:
        return Difference(n, mean, mean - half, mean + half, 1.0 if n < 2 or mean == 0 else 0.0)
    statistic = mean * student_t_quantile(n - 1) / half
    return Difference(n, mean, mean - half, mean + half, 2 * (1 - student_t_cdf(abs(statistic), n - 1)))


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, by Simpson's rule: with t = sqrt(degrees) * tan(angle) the density is cos(angle)^(degrees-1)."""

    def integral(angle: float) -> float:
        angles = np.linspace(0.0, angle, QUADRATURE_POINTS)
        weights = np.full(QUADRATURE_POINTS, 2.0)
        weights[1::2], weights[[0, -1]] = 4.0, 1.0
        return float((weights * np.cos(angles) ** (degrees - 1)).sum() * angle / (3 * (QUADRATURE_POINTS - 1)))

    return 0.5 + 0.5 * integral(math.atan(t / math.sqrt(degrees))) / integral(math.pi / 2)


@lru_cache
def student_t_quantile(degrees: int) -> float:
    """What |T| stays below with 95% probability."""
    low, high = 0.0, 20.0  # with one degree of freedom it is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, degrees) < (1 + CONFIDENCE) / 2 else (low, middle)
    return low


def _mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Infinitely wide for a single value."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, math.inf
    return mean, student_t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
