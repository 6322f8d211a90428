"""How many responses a second the reward pool judges, against calling math-verify directly in one process.

    python tools/bench_rewards.py [--workers 2] [--problems 100] [--think-tokens 4000]

Responses are synthetic: prose with formulas, then a boxed answer. A fifth of the answers are wrong, and a group of 8
shares its ground truth, as in training. Prints items per second and their ratio.
"""

import argparse
import asyncio
import logging
import random
import time
from collections.abc import Callable

import math_verify

from megatron_gppo.config import RewardConfig
from megatron_gppo.datatypes import Prompt, Response
from megatron_gppo.rollout.rewards import Rewards

GROUP_SIZE = 8
CHARACTERS_PER_TOKEN = 3
SENTENCE = "Let $x_{%d}$ be as above, so that $x^2 + %d = 17$ and hence $x = \\sqrt{%d}$. Then we get 12 + 5. "

Group = tuple[Prompt, list[Response]]


def integers(draw: random.Random) -> tuple[str, str, str]:
    """Ground truth, another way to write it, and a wrong answer."""
    number = draw.randrange(1000)
    return str(number), f"{number}.", str(number + 1)


def latex(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randrange(2, 40), draw.randrange(2, 40)
    return draw.choice(
        [
            (f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"\\frac{{{a + 1}}}{{{b}}}"),
            (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b + 1}}}"),
            (f"({a}, {b})", f"\\left({a}, {b}\\right)", f"({b}, {a + 1})"),
            (f"x^2 + {a}x", f"x(x + {a})", f"x^2 - {a}x"),
        ]
    )


def make_groups(kind: Callable[[random.Random], tuple[str, str, str]], count: int, think_tokens: int) -> list[Group]:
    draw = random.Random(0)
    think = "".join(SENTENCE % (n, n, n) for n in range(think_tokens * CHARACTERS_PER_TOKEN // len(SENTENCE)))
    groups = []
    for row in range(count):
        truth, same, wrong = kind(draw)
        answers = [draw.choices([truth, same, wrong], [0.5, 0.3, 0.2])[0] for _ in range(GROUP_SIZE)]
        responses = [Response([], [], f"{think}</think>So \\boxed{{{answer}}}", "stop", []) for answer in answers]
        groups.append((Prompt(row, [], "", truth, "benchmark"), responses))
    return groups


def directly(groups: list[Group]) -> float:
    """Items per second of math_verify.parse and verify, with their own time limits, in this process."""
    started = time.perf_counter()
    for prompt, responses in groups:
        for response in responses:
            math_verify.verify(math_verify.parse(f"\\boxed{{{prompt.ground_truth}}}"), math_verify.parse(response.text))
    return GROUP_SIZE * len(groups) / (time.perf_counter() - started)


def pooled(groups: list[Group], rewards: Rewards) -> float:
    async def judge_all() -> None:
        await asyncio.gather(*(rewards.judge(prompt, responses) for prompt, responses in groups))

    started = time.perf_counter()
    asyncio.run(judge_all())
    return GROUP_SIZE * len(groups) / (time.perf_counter() - started)


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Benchmark the reward pool against calling math-verify directly.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--think-tokens", type=int, default=4000)
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    print(f"{'answers':<10}{'math-verify':>14}{'pool':>10}{'ratio':>8}   items per second")
    for kind in (integers, latex):
        groups = make_groups(kind, arguments.problems, arguments.think_tokens)
        for scope in ("last_boxed", "response"):
            rewards = Rewards(RewardConfig(workers=arguments.workers, scope=scope))
            try:
                pool = pooled(groups, rewards)
            finally:
                rewards.close()
            direct = directly(groups)
            print(f"{kind.__name__:<10}{direct:>14.0f}{pool:>10.0f}{pool / direct:>8.1f}   scope {scope}")


if __name__ == "__main__":
    main()
