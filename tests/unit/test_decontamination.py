"""Which training questions count as leaked from the evaluation sets."""

from megatron_gppo.data import Contamination, find_contamination

PROBLEM = (
    "Let $x$ be a positive integer such that x squared plus 7 is divisible by 11. Find the sum of all such x below 100."
)


def test_nine_words_in_a_row_are_contamination_and_eight_are_not() -> None:
    eight = "We know: be a POSITIVE integer; such that (x) squared, minus 7"
    nine = "We know: be a POSITIVE integer; such that (x) squared, plus 6"
    assert find_contamination([eight, nine], {"aime": ["another", PROBLEM]}, 9) == [
        Contamination(1, "aime", 1, "be a positive integer such that x squared plus")
    ]
    assert [found.prompt for found in find_contamination([eight, nine], {"aime": [PROBLEM]}, 8)] == [0, 1]


def test_short_problems_are_compared_as_a_whole() -> None:
    assert find_contamination(["What is 2+2 ?", "What is 2+2+2?"], {"b": ["what is 2 + 2"]}, 9) == [
        Contamination(0, "b", 0, "^what is 2 2")
    ]
    assert find_contamination(["...", ""], {"b": ["?!"]}, 9) == []


def test_what_many_problems_of_a_benchmark_share_is_boilerplate() -> None:
    suffix = " Please reason step by step, and put your final answer within the box now."
    problems = [f"problem number {n} is a different one from all the others here{suffix}" for n in range(10)]
    assert find_contamination([f"my own question{suffix}"], {"b": problems}, 9) == []
    leaked = "problem number 3 is a different one from all the others"
    assert find_contamination([leaked], {"b": problems}, 9)[0].problem == 3


def test_characters_of_languages_without_spaces_are_words() -> None:
    problem = "求所有满足条件的正整数的和"
    assert find_contamination(["已知: 满足条件的正整数的积"], {"b": [problem]}, 9)[0].problem == 0
    assert find_contamination(["已知: 正整数的积"], {"b": [problem]}, 9) == []
