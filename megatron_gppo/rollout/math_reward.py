"""The reward `math_verify`: whether a response's answer equals the ground truth as mathematics.

Runs in reward workers, whose pool kills what takes too long. What is known to take for ever is refused before: text that
is very long or deeply nested, which the grammar needs more than linear time for, and numbers of very many digits, which
comparing would write out. Refused answers count as unparsable.
"""

import functools
import logging
import math
import re
import traceback
from typing import Any, Literal

import math_verify
import sympy

from megatron_gppo.rollout.answers import after_think, last_boxed, nesting_depth
from megatron_gppo.rollout.reward_protocol import MAX_DETAIL_CHARACTERS, Judgement, Question

MAX_ANSWER_CHARACTERS = 2000
MAX_NESTING = 40
MAX_DIGITS = 500_000  # of any number in an answer, once it is evaluated
MAX_RESPONSE_CHARACTERS = 400_000  # scope "response": its end; 32k tokens of prose are about 130,000
CACHED_EXPRESSIONS = 256  # a group shares its ground truth, and often its answers
_INTEGER = re.compile(r"[+-]?\d{1,100}", re.ASCII)


class MathReward:
    """Judges responses one by one; see RewardConfig for scope and after_think."""

    def __init__(self, scope: Literal["last_boxed", "response"], after_think: bool) -> None:
        self._scope = scope
        self._after_think = after_think
        # It warns that its own time limits are off. They are signals, which SymPy's C code can hold up; the pool kills.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._parse_answer = functools.lru_cache(CACHED_EXPRESSIONS)(_parse_answer)
        self(Question(r"\boxed{\frac{1}{2}}", "0.25", ""))  # builds the parser's tables, a fraction of a second

    def __call__(self, question: Question) -> Judgement:
        if question.response is None:
            return self._read_ground_truth(question.ground_truth)
        text = after_think(question.response) if self._after_think else question.response
        boxed = last_boxed(text)
        answer = _plain(boxed) if boxed is not None else None
        if self._scope == "last_boxed" and not answer:
            return Judgement("unparsable")
        truth = _plain_truth(question.ground_truth)
        if self._scope == "last_boxed" and answer == truth:
            return Judgement("scored", True, answer)
        try:
            if self._scope == "last_boxed":
                assert answer is not None
                if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(truth):
                    return Judgement("scored", int(answer) == int(truth), answer)
                parsed = self._parse_answer(answer)
            elif answer is None or _is_bounded(answer):
                parsed = _parse(text[-MAX_RESPONSE_CHARACTERS:])
                answer = parsed[1] if parsed is not None else answer
            else:
                parsed = None
            parsed_truth = self._parse_answer(truth)
            if parsed_truth is None:
                detail = f"the ground truth {question.ground_truth!r} cannot be parsed, only compared as text"
                return Judgement("unparsable", answer=answer, detail=detail)
            if parsed is None:
                return Judgement("unparsable", answer=answer)
            correct = math_verify.verify(parsed_truth, parsed, timeout_seconds=None, raise_on_error=True)
        except Exception:
            return Judgement("crash", answer=answer, detail=traceback.format_exc()[-MAX_DETAIL_CHARACTERS:])
        return Judgement("scored", correct, answer)

    def _read_ground_truth(self, ground_truth: str) -> Judgement:
        try:
            readable = self._parse_answer(_plain_truth(ground_truth)) is not None
        except Exception:
            readable = False
        return Judgement("scored", True) if readable else Judgement("unparsable")


def _parse_answer(latex: str) -> list[Any] | None:
    return _parse(f"\\boxed{{{latex}}}") if _is_bounded(latex) else None


def _is_bounded(latex: str) -> bool:
    return len(latex) <= MAX_ANSWER_CHARACTERS and nesting_depth(latex) <= MAX_NESTING


def _parse(text: str) -> list[Any] | None:
    """[expression, text], which is what `verify` takes; None where there is no expression that can be compared."""
    parsed = math_verify.parse(text, parsing_timeout=None)
    # [text] alone: LaTeX that could not be read.
    return parsed if len(parsed) >= 2 and _log10(parsed[0]) <= MAX_DIGITS else None


def _log10(expression: Any) -> float:
    """About the decimal digits of the largest number in the expression, without evaluating it. Symbols count as 10."""
    inner = [_log10(part) for part in getattr(expression, "args", ()) or ()]
    if isinstance(expression, sympy.Rational):
        return max(abs(expression.p), expression.q).bit_length() * math.log10(2)
    if isinstance(expression, sympy.Symbol):
        return 1.0
    if isinstance(expression, sympy.Pow):
        return max(*inner, inner[0] * _power_of_10(inner[1]))
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        return max(*inner, 0.0) * _power_of_10(max(inner))
    if isinstance(expression, sympy.Mul):
        return sum(inner)
    return max(inner, default=0.0)


def _power_of_10(exponent: float) -> float:
    return 10.0**exponent if exponent < 300 else math.inf


def _plain_truth(ground_truth: str) -> str:
    boxed = last_boxed(ground_truth)
    return _plain(ground_truth if boxed is None else boxed)


def _plain(latex: str) -> str:
    """Without the full stop that may end an answer, and that the parser stumbles over."""
    return latex.strip().removesuffix(".").rstrip()
