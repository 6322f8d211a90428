"""Where in a response its answer stands. Every function here is linear in the text, whatever a model wrote."""

import re

THINK_END = "</think>"
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_BRACKET = re.compile(r"[({\[]|[)}\]]")


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, or None."""
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


def after_think(text: str) -> str:
    """What follows the last </think>; the whole text where there is none."""
    return text.rpartition(THINK_END)[2]


def is_well_formed(text: str) -> bool:
    """Whether thinking ends once at most, and a complete \\boxed{} follows. The opening <think> may be in the prompt."""
    thinking, _, answer = text.rpartition(THINK_END)
    return THINK_END not in thinking and last_boxed(answer) is not None


def nesting_depth(text: str) -> int:
    """Most brackets of any kind that are open at once, those that nothing closes included."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0] in "({[" else -1
        deepest = max(deepest, depth)
    return deepest
