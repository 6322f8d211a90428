"""The table of tools/bench_staleness.py, from curves with known values."""

import pytest

from megatron_gppo.plot import Curves
from tools.bench_staleness import table


def curves(**seconds: float) -> Curves:
    """Of four steps; the first two, which do not count, are ten times as long."""
    tags = {f"seconds/{phase}": value for phase, value in seconds.items()} | {"rollout/staleness_mean": 1.0}
    by_step = {tag: {step: value * (10 if step <= 2 else 1) for step in range(1, 5)} for tag, value in tags.items()}
    return by_step | {"eval/average": {4: 0.5}}


ALTERNATING = curves(step=8.0, rollout=4.0, generate=3.9, score=1.0, train=2.0, sync=0.5)
AHEAD = curves(step=5.0, rollout=0.1, generate=4.5, score=1.0, train=2.0, sync=1.0)


def cells(line: str) -> dict[str, str]:
    return dict(zip(HEADINGS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))


HEADINGS = (
    *("staleness", "s/step", "waits for rollout", "score", "train", "sync"),
    *("bound", "engine busy", "mean age", "accuracy"),
)


def test_engines_are_not_busy_while_a_sync_pauses_them() -> None:
    heading, _, alternating, ahead = table({0: ALTERNATING, 1: AHEAD})
    assert tuple(cell.strip() for cell in heading.strip("|").split("|")) == HEADINGS
    assert cells(alternating)["engine busy"] == "49%"  # 3.9 of 8: nothing is generated during its syncs
    assert cells(ahead)["engine busy"] == "70%"  # 4.5 - 1 of 5


def test_the_bound_is_the_longer_side_alone_and_the_rows_own_sync() -> None:
    _, _, alternating, ahead = table({0: ALTERNATING, 1: AHEAD})
    assert cells(ahead)["bound"] == "5.00"  # max(4, 1 + 2) + 1
    assert cells(alternating)["bound"] == "-"
    training_is_slower = curves(step=8.0, rollout=1.0, generate=0.9, score=1.0, train=2.0, sync=0.5)
    assert cells(table({0: training_is_slower, 1: AHEAD})[-1])["bound"] == "4.00"
    assert cells(table({1: AHEAD})[-1])["bound"] == "-"  # nothing to work it out from


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_first_steps_do_not_count(staleness: int) -> None:
    assert cells(table({staleness: AHEAD})[-1])["s/step"] == "5.00"
