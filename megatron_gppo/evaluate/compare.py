"""Whether one model is better than another: two reports, compared problem by problem."""

from dataclasses import dataclass

from rich.table import Table

from megatron_gppo.evaluate.records import EvaluationError
from megatron_gppo.evaluate.report import Report, Score, accuracies_of
from megatron_gppo.evaluate.statistics import Difference, paired_difference

ALL = "all problems"


@dataclass(frozen=True, slots=True)
class Comparison:
    """avg@k of two models on the problems that both reports have."""

    first: float
    second: float
    difference: Difference  # second - first
    unpaired: int  # problems that only one of the reports has
    caution: str | None  # why the two are not alike, beside the models


def compare_reports(first: Report, second: Report) -> dict[str, Comparison]:
    """By benchmark, and over all problems if there are several. Raises EvaluationError when they have none in common."""
    common = [name for name in first.scores if name in second.scores]
    if not common:
        raise EvaluationError(
            f"the reports have no benchmark in common: {', '.join(first.scores)} and {', '.join(second.scores)}. Fix: evaluate both on the same"
        )
    found = {name: _compare([first.scores[name]], [second.scores[name]]) for name in common}
    if len(common) > 1:
        found[ALL] = _compare([first.scores[name] for name in common], [second.scores[name] for name in common])
    return found


def comparison_table(first: Report, second: Report, comparisons: dict[str, Comparison]) -> Table:
    """compare_reports' result, a row a benchmark."""
    table = Table(title=f"{second.model} against {first.model}: avg@k in %, paired over problems")
    for heading in ("benchmark", "problems", "first", "second", "difference", "95% interval", "p", "significant at 5%"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right", no_wrap=True)
    for name, of_one in comparisons.items():
        difference = of_one.difference
        table.add_row(
            name,
            str(difference.problems),
            f"{100 * of_one.first:.1f}",
            f"{100 * of_one.second:.1f}",
            f"{100 * difference.mean:+.1f}",
            f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
            f"{difference.p_value:.3f}",
            "yes" if difference.significant else "no",
        )
    return table


def _compare(first: list[Score], second: list[Score]) -> Comparison:
    one, other = accuracies_of(first), accuracies_of(second)
    keys = [key for key in one if key in other]
    if not keys:
        raise EvaluationError(
            "the reports have no problem of a benchmark in common. Fix: evaluate both on the same files"
        )
    before, after = [one[key] for key in keys], [other[key] for key in keys]
    unlike = [
        name
        for name in ("samples", "temperature", "top_p", "max_response_tokens")
        if [getattr(score, name) for score in first] != [getattr(score, name) for score in second]
    ]
    return Comparison(
        first=sum(before) / len(keys),
        second=sum(after) / len(keys),
        difference=paired_difference(before, after),
        unpaired=len(one.keys() ^ other.keys()),
        caution=f"{', '.join(unlike)} differ" if unlike else None,
    )
