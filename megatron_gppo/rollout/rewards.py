"""The reward of a response: what the main function says of it, and what the others add.

    reward = answer + weight * format + sum(weight * extra) [+ overlong, in training: OverlongPenalty]

Only the main function decides what is correct. A function that fails on a response is counted (Verdict.outcome) and
adds nothing; the main one then gives the reward of a wrong answer.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from megatron_gppo.config import OverlongConfig, RewardConfig
from megatron_gppo.datatypes import Outcome, Prompt, Response, Verdict
from megatron_gppo.rollout.answers import is_well_formed
from megatron_gppo.rollout.generate import Judge
from megatron_gppo.rollout.reward_pool import RewardPool
from megatron_gppo.rollout.reward_protocol import Judgement
from megatron_gppo.rollout.reward_worker import MATH_VERIFY

ANSWER, FORMAT, OVERLONG = "answer", "format", "overlong"  # parts of a reward, beside reward.extra's


class Rewards:
    """All reward functions of a configuration, each with workers of its own. Usable from one event loop after another."""

    def __init__(self, config: RewardConfig) -> None:
        """Starts the workers. Raises RewardError or OSError, and then leaves none running."""
        self._config = config
        with ExitStack() as stack:
            self._main = RewardPool(config)
            stack.callback(self._main.close)
            self._extra = {}
            for name, extra in config.extra.items():
                self._extra[name] = RewardPool(extra, f"reward.extra.{name}")
                stack.callback(self._extra[name].close)
            self._stack = stack.pop_all()

    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
        """The verdicts on one prompt's responses, in their order.

        Raises RewardError or OSError when a worker died and no new one could be started, and when the pools are closed.
        """
        pools = [self._main, *self._extra.values()]
        judged = await asyncio.gather(*(pool.judge(prompt, responses) for pool in pools))
        return [self._verdict(response, *of_one) for response, *of_one in zip(responses, *judged, strict=True)]

    def unparsable_ground_truths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices of the prompts whose ground truth math_verify cannot read; none for a function of the user's."""
        if self._config.function != MATH_VERIFY:
            return []

        async def unreadable() -> set[str]:
            texts = list(dict.fromkeys(prompt.ground_truth for prompt in prompts))
            judgements = await asyncio.gather(*(self._main.read_ground_truth(text) for text in texts))
            return {text for text, judgement in zip(texts, judgements, strict=True) if judgement.outcome != "scored"}

        bad = asyncio.run(unreadable())
        return [index for index, prompt in enumerate(prompts) if prompt.ground_truth in bad]

    def close(self) -> None:
        """Kills the workers and waits until they are gone. What is being judged raises RewardError."""
        self._stack.close()

    def _verdict(self, response: Response, main: Judgement, *extra: Judgement) -> Verdict:
        config = self._config
        if isinstance(main.score, bool) or main.score is None:
            correct = bool(main.score)
            reward = config.correct if correct else config.incorrect
        else:
            correct, reward = main.score > config.correct_above, main.score
        parts = {}
        if config.format_weight:
            parts[FORMAT] = config.format_weight * is_well_formed(response.text)
        for (name, of), judgement in zip(config.extra.items(), extra, strict=True):
            parts[name] = of.weight * float(judgement.score or 0.0)
        outcomes: list[Outcome] = [judged.outcome for judged in (main, *extra) if judged.outcome != "scored"]
        outcome = outcomes[0] if outcomes else "scored"
        return _with_parts(Verdict(reward, correct, outcome, main.answer), parts)


class OverlongPenalty:
    """A judge's verdicts with DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13).

    A response of L tokens loses penalty * (L - start) / buffer_tokens beyond start = max_response_tokens - buffer_tokens.
    """

    def __init__(self, judge: Judge, config: OverlongConfig, max_response_tokens: int) -> None:
        self._judge = judge
        self._config = config
        self._start = max_response_tokens - config.buffer_tokens

    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
        verdicts = await self._judge.judge(prompt, responses)
        return [
            _with_parts(verdict, {OVERLONG: -self.of(len(response.token_ids))})
            for verdict, response in zip(verdicts, responses, strict=True)
        ]

    def of(self, num_tokens: int) -> float:
        """What a response of so many tokens loses, from 0 to penalty."""
        share = (num_tokens - self._start) / self._config.buffer_tokens
        return self._config.penalty * min(max(share, 0.0), 1.0)


def _with_parts(verdict: Verdict, parts: dict[str, float]) -> Verdict:
    """The verdict with more parts added to its reward."""
    if not parts:
        return verdict
    parts = {**(verdict.parts or {ANSWER: verdict.reward}), **parts}
    return replace(verdict, reward=sum(parts.values()), parts=parts)
