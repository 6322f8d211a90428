"""Stand-ins for our own Engine and Judge in unit tests. Nothing here claims to generate."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_gppo.config import SamplingConfig
from megatron_gppo.datatypes import Prompt, Response, Verdict
from megatron_gppo.rollout.dispatch import Prospect
from megatron_gppo.rollout.engine import Engine, EngineError
from megatron_gppo.rollout.pieces import Staleness


class FakeEngine(Engine):
    """Answers prompt [row] with n responses [row, i, 1] after a moment that differs from prompt to prompt."""

    def __init__(self, url: str = "http://fake", *, version: int = 0, fails_on: int | None = None) -> None:
        super().__init__(url)
        self.version = version
        self.fails_on = fails_on
        self.in_flight = self.most_in_flight = self.finished = self.aborts = 0

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingConfig,
        n: int,
        counts: Counter[str],
        staleness: Staleness | None = None,
    ) -> list[Response]:
        [row] = prompt_ids
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.001 * (-row % 5))
            if row == self.fails_on:
                raise EngineError(f"prompt {row} failed")
            self.finished += 1
            return [Response([row, i, 1], [-0.5] * 3, f"{row}.{i}", "stop", [self.version] * 3) for i in range(n)]
        finally:
            self.in_flight -= 1

    async def healthy(self) -> bool:
        return True

    async def abort(self) -> None:
        self.aborts += 1


class FixedEngines:
    """Engines that serve until they are lost, and never come back. See EngineSource."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.reasons: dict[str, str] = {}  # of the lost ones, by URL

    def serving(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.url not in self.reasons]

    def front(self) -> Engine | None:
        return None

    def lost(self, url: str, why: str) -> None:
        assert url not in self.reasons
        self.reasons[url] = why

    def prospect(self) -> Prospect:
        raise EngineError(f"no engine is left: {'; '.join(self.reasons.values())}")

    def quiet_since(self) -> float:
        return -math.inf

    def take_counts(self) -> dict[str, int]:
        return {}


class ReturningEngines(FixedEngines):
    """A lost engine comes back after some looks, in need of weights, until `given` is called."""

    def __init__(self, engines: Sequence[Engine], looks: int = 3) -> None:
        super().__init__(engines)
        self.looks = looks

    def prospect(self) -> Prospect:
        self.looks -= 1
        return "starting" if self.looks > 0 else "needs weights"

    def given(self) -> None:
        self.reasons.clear()


class FakeJudge:
    """Rewards the first response of each prompt, except where `equal_rows` says that all get 0."""

    def __init__(self, equal_rows: Any = ()) -> None:
        self.equal_rows = equal_rows

    async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
        correct = [index == 0 and prompt.row not in self.equal_rows for index in range(len(responses))]
        return [Verdict(float(right), right, "scored") for right in correct]


class CountingPrompts:
    """Prompts 0, 1, 2, ... without end."""

    def __init__(self) -> None:
        self.taken = 0

    @property
    def position(self) -> int:
        return self.taken

    def take(self, n: int) -> list[Prompt]:
        rows = range(self.taken, self.taken + n)
        self.taken += n
        return [Prompt(row, [row], f"prompt {row}", str(row), "fake") for row in rows]
