"""Training prompts that evaluation problems have leaked into, by n-grams of words.

A prompt is contaminated when it shares n words in a row with an evaluation problem, or is one that has fewer words.
N-grams that at least a fifth of a benchmark's problems have are its boilerplate ("put your final answer within ..."),
which says nothing about a problem, and are not compared.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BOILERPLATE_SHARE = 0.2  # of a benchmark's problems, and two at least
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Contamination:
    """What a training prompt shares with an evaluation problem; the first that was found."""

    prompt: int  # index of the training question
    benchmark: str
    problem: int  # index of the benchmark's question
    ngram: str


def find_contamination(
    questions: Sequence[str], benchmarks: Mapping[str, Sequence[str]], n: int
) -> list[Contamination]:
    """The contaminated among the training questions, in their order. Case and punctuation do not matter."""
    known: dict[str, tuple[str, int]] = {}
    for benchmark, problems in benchmarks.items():
        ngrams = [set(_ngrams(words(problem), n)) for problem in problems]
        counts = Counter(ngram for of_one in ngrams for ngram in of_one)
        limit = max(2.0, BOILERPLATE_SHARE * len(problems))
        for index, of_one in enumerate(ngrams):
            for ngram in of_one:
                if counts[ngram] < limit:
                    known.setdefault(ngram, (benchmark, index))
    found = []
    for index, question in enumerate(questions):
        shared = next((ngram for ngram in _ngrams(words(question), n) if ngram in known), None)
        if shared is not None:
            found.append(Contamination(index, *known[shared], shared))
    return found


def words(text: str) -> list[str]:
    """Letters and digits in a row, folded to one case."""
    return _WORD.findall(text.casefold())


def _ngrams(of: list[str], n: int) -> Iterator[str]:
    """Of a text with fewer words than n the whole, marked so that it equals no part of a longer one."""
    if 0 < len(of) < n:
        yield "^" + " ".join(of)
    for start in range(len(of) - n + 1):
        yield " ".join(of[start : start + n])
