"""Two-digit additions, split into three parts that share no problem.

The warm-up learns from one part, CE-GPPO from another, and the third is held out from both: what the run reports is
measured on sums that the model has never seen.
"""

import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

NUM_WARM_UP = 3794
NUM_HELD_OUT = 512


@dataclass(frozen=True, slots=True)
class Problem:
    """One addition, e.g. question "27+65" with answer "92"."""

    question: str
    answer: str

    def as_row(self) -> dict[str, Any]:
        """A chat row, the format that data.train and data.eval read by default."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "reward_model": {"ground_truth": self.answer},
            "data_source": "addition",
        }


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """All 8,100 problems a+b with 10 <= a, b <= 99, each in exactly one part."""

    warm_up: list[Problem]
    train: list[Problem]
    held_out: list[Problem]


def make_problem_sets(seed: int) -> ProblemSets:
    """Splits all problems at random; the same seed always gives the same parts in the same order."""
    problems = [Problem(f"{a}+{b}", str(a + b)) for a, b in product(range(10, 100), repeat=2)]
    random.Random(seed).shuffle(problems)
    return ProblemSets(
        held_out=problems[:NUM_HELD_OUT],
        warm_up=problems[NUM_HELD_OUT : NUM_HELD_OUT + NUM_WARM_UP],
        train=problems[NUM_HELD_OUT + NUM_WARM_UP :],
    )


def write_jsonl(path: Path, problems: list[Problem]) -> None:
    """Writes one chat row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem.as_row()) + "\n" for problem in problems))
