"""What a RewardPool and its worker processes say to each other. Workers load this, so it imports nothing heavy.

Over the connection, pickled:

    worker -> pool   once, when it is ready: whether it judges one question after the other, in order; or a str that says
                     why the reward function cannot be used
    pool -> worker   list[Question]
    worker -> pool   (index, Judgement) for each question, in any order, each as soon as it is known
"""

from typing import Literal, NamedTuple

MAX_DETAIL_CHARACTERS = 4000


class Question(NamedTuple):
    """One response to judge."""

    response: str | None  # None asks math_verify only whether it can read the ground truth
    ground_truth: str
    data_source: str


class Judgement(NamedTuple):
    """What the reward function said of one response."""

    outcome: Literal["scored", "unparsable", "timeout", "crash"]
    score: bool | float | None = None  # None unless scored; a bool says correct or not, a float is the reward
    answer: str | None = None  # what was judged, where the function says so
    detail: str | None = None  # for the log: what went wrong, when that is not the response's fault


class FunctionSpec(NamedTuple):
    """The reward function that a worker is to run: RewardConfig without what is the pool's own."""

    function: str  # math_verify, or package.module:function
    batched: bool
    timeout_s: float
    memory_mb: int | None
    scope: Literal["last_boxed", "response"]
    after_think: bool
