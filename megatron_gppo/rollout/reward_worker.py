"""The process that judges responses, one after another, for a RewardPool.

This module and what it imports stay free of torch and of the rest of the package, so that a worker is up in about a
second and takes some 60 MB. Talk over the connection, pickled:

    worker -> pool   once: None when it is ready, or a str that says why the reward function cannot be used
    pool -> worker   list[Question]
    worker -> pool   one Judgement for each question, in order, each as soon as it is known

Time limits are the pool's: it kills a worker that takes too long.
"""

import ctypes
import functools
import importlib
import inspect
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

MATH_VERIFY = "math_verify"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_DETAIL_CHARACTERS = 4000

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


class Question(NamedTuple):
    """One response to judge."""

    response: str
    ground_truth: str
    data_source: str


class Judgement(NamedTuple):
    """What the reward function said of one response."""

    outcome: Literal["scored", "unparsable", "crash"]
    score: bool | float | None = None  # None unless scored; a bool says correct or not, a float is the reward
    detail: str | None = None  # for the log: what went wrong, when that is not the response's fault


RewardFunction = Callable[[Question], Judgement]


def serve(handle: int, function: str) -> None:
    """Runs the worker on the connection with this file descriptor until its other end is closed."""
    _outlive_signals_but_not_the_trainer()
    connection = Connection(handle)
    judge = _load(function)
    if isinstance(judge, str):
        connection.send(judge)
        return
    try:
        connection.send(None)
        while True:
            for question in connection.recv():
                connection.send(judge(question))
    except (EOFError, OSError):
        pass  # the pool was closed, or the trainer is gone


def _outlive_signals_but_not_the_trainer() -> None:
    # Ctrl-C and a scheduler's SIGTERM mean the trainer, which may still need verdicts to finish its step. Handlers that
    # do nothing rather than SIG_IGN, which programs that a reward function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The closed connection ends a worker that waits. One that hangs, perhaps inside C code, would never notice.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _load(function: str) -> RewardFunction | str:
    """The reward function, ready to be called at full speed, or why there is none."""
    if function == MATH_VERIFY:
        return _load_math_verify()
    module_name, colon, attribute = function.partition(":")
    if not (module_name and colon and attribute):
        return "not of the form package.module:function. Fix: write it so, or math_verify"
    try:
        module = importlib.import_module(module_name)
    except Exception:
        return (
            f"importing {module_name} failed. Fix: mend the module, or put its folder on PYTHONPATH\n"
            + traceback.format_exc()
        )
    user_function = getattr(module, attribute, None)
    if not callable(user_function):
        return f"{module.__name__} has no function {attribute}. Fix: correct the name"
    try:
        inspect.signature(user_function).bind("response", "ground truth", "data source")
    except (TypeError, ValueError) as error:
        return f"it cannot be called with (response, ground_truth, data_source): {error}. Fix: take these three"
    return functools.partial(_call_user_function, user_function)


def _call_user_function(user_function: Callable[[str, str, str], Any], question: Question) -> Judgement:
    try:
        score = user_function(*question)
        score = score.item() if hasattr(score, "item") else score  # NumPy and torch scalars
        if not isinstance(score, bool):
            score = float(score)
            if score != score or abs(score) == float("inf"):
                raise ValueError(f"the reward function returned {score}; it must return a finite number or a bool")
    except Exception:
        return Judgement("crash", detail=traceback.format_exc()[-MAX_DETAIL_CHARACTERS:])
    return Judgement("scored", score)


def _load_math_verify() -> RewardFunction | str:
    try:
        import math_verify
    except ImportError as error:
        return f"math-verify cannot be imported ({error}). Fix: pip install math-verify"
    # It warns that its own time limits are off. They are signals, which SymPy's C code can hold up; the pool kills.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    @functools.lru_cache(maxsize=256)  # a group shares its ground truth, and often its answers
    def parse(latex: str) -> list[Any]:
        return math_verify.parse(f"\\boxed{{{latex}}}", parsing_timeout=None)

    def judge(question: Question) -> Judgement:
        answer = last_boxed(question.response)
        if answer is None or not (answer := _plain(answer)):
            return Judgement("unparsable")
        boxed_truth = last_boxed(question.ground_truth)
        truth = _plain(question.ground_truth if boxed_truth is None else boxed_truth)
        if answer == truth:
            return Judgement("scored", True)
        try:
            # Each is [expression, text], or [text] where the LaTeX could not be read.
            parsed_truth, parsed_answer = parse(truth), parse(answer)
            if len(parsed_truth) < 2:
                detail = f"the ground truth {question.ground_truth!r} cannot be parsed, only compared as text"
                return Judgement("unparsable", detail=detail)
            if len(parsed_answer) < 2:
                return Judgement("unparsable")
            correct = math_verify.verify(parsed_truth, parsed_answer, timeout_seconds=None, raise_on_error=True)
        except Exception:
            return Judgement("crash", detail=traceback.format_exc()[-MAX_DETAIL_CHARACTERS:])
        return Judgement("scored", correct)

    judge(Question(r"\boxed{\frac{1}{2}}", "0.25", ""))  # builds the parser's tables, a fraction of a second
    return judge


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, or None. Linear in the text, whatever its braces."""
    content = None
    starts: list[int | None] = []  # of the open braces: where the content begins if \boxed opened it, else None
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] == "}":
            start = starts.pop() if starts else None
            if start is not None:
                content = (start, token.start())
        elif token[0] == "{":
            starts.append(None)
        elif token[0].endswith("{") and token[0] != "\\{":
            starts.append(token.end())
    return None if content is None else text[slice(*content)]


def _plain(latex: str) -> str:
    """Without the full stop that may end an answer, and that the parser stumbles over."""
    return latex.strip().removesuffix(".").rstrip()
