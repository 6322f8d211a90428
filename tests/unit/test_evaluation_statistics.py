"""avg@k, pass@k and maj@k against enumeration, and intervals against known quantiles and by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gppo.evaluate.statistics import (
    Estimate,
    estimate,
    majority_correct,
    paired_difference,
    pass_at,
    student_t_cdf,
    student_t_quantile,
)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    assert pass_at(k, len(correct), sum(correct)) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("correct", "answers", "expected"),
    [
        ([True, True, False], ["1/2", "0.5", "3"], 1.0),  # correct ones vote together
        ([True, False, False], ["2", "3", "3"], 0.0),
        ([True, False, False], ["2", "3", "4"], 1 / 3),
        ([True, False], ["2", "3"], 0.5),
        ([True, False, False], ["2", None, None], 1.0),  # no answer, no vote
        ([False, False], [None, None], 0.0),
        ([True, True], [None, None], 1.0),
        ([False, False], ["3", "3"], 0.0),
    ],
)
def test_majority(correct: list[bool], answers: list[str | None], expected: float) -> None:
    assert majority_correct(correct, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (29, 2.0452), (499, 1.9647), (5000, 1.9604)]
)
def test_students_t_has_the_quantiles_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)
    assert student_t_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-5)
    assert student_t_cdf(0.0, degrees) == 0.5


def test_an_interval_by_hand() -> None:
    # Mean 0.5, sample standard deviation sqrt(0.125), and t(3) = 3.1824.
    values = [0.0, 0.5, 0.5, 1.0]
    half = 3.1824 * math.sqrt(1 / 6) / 2
    found = estimate(values)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0), "clipped to what a share can be"
    values = [0.4, 0.5, 0.5, 0.6]
    half = 3.1824 * math.sqrt(0.02 / 3) / 2
    found = estimate(values)
    assert (found.low, found.high) == (pytest.approx(0.5 - half, abs=1e-4), pytest.approx(0.5 + half, abs=1e-4))


def test_all_right_and_all_wrong_are_not_certain() -> None:
    # Clopper and Pearson's interval: with 30 of 30, 0.025^(1/30).
    assert estimate([1.0] * 30) == Estimate(1.0, pytest.approx(0.8843, abs=1e-4), 1.0)
    assert estimate([0.0] * 30) == Estimate(0.0, 0.0, pytest.approx(0.1157, abs=1e-4))
    assert estimate([0.5]) == Estimate(0.5, 0.0, 1.0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """30 problems of differing difficulty, 32 samples each."""
    random = np.random.default_rng(0)
    difficulty = random.beta(1.0, 1.5, size=(2000, 30))
    shares = random.binomial(32, difficulty) / 32
    covered = [found.low <= 0.4 <= found.high for found in map(estimate, shares)]  # the mean of Beta(1, 1.5)
    assert 0.93 < np.mean(covered) < 0.97


def test_pairing_finds_what_unpaired_intervals_would_hide() -> None:
    first = [n / 40 for n in range(30)]
    second = [share + (0.04 if n % 2 else 0.02) for n, share in enumerate(first)]
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.03)
    assert found.significant
    assert 0.02 < found.low < 0.03 < found.high < 0.04
    assert estimate(first).high > estimate(second).low


def test_differences_without_evidence() -> None:
    assert paired_difference([0.5, 0.5], [0.5, 0.5]).p_value == 1.0
    assert not paired_difference([0.5], [1.0]).significant
    found = paired_difference([0.0, 1.0, 0.5, 0.2], [1.0, 0.0, 0.6, 0.2])
    assert not found.significant
    assert found.low < 0 < found.high
    # t = 1.5 / (1.2910 / 2) = 2.3238 with 3 degrees of freedom
    assert paired_difference([0, 0, 0, 0], [0, 1, 2, 3]).p_value == pytest.approx(0.1027, abs=1e-3)


def test_one_in_twenty_differences_by_chance_is_called_significant() -> None:
    random = np.random.default_rng(1)
    pairs = random.binomial(8, random.beta(1, 1, size=(2000, 40, 1)), size=(2000, 40, 2)) / 8
    found = [paired_difference(*pair.T).significant for pair in pairs]
    assert 0.035 < np.mean(found) < 0.065
