"""Generation and judging of all benchmarks on some engines, at once: their long tails overlap."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gppo.config import RewardConfig, RolloutConfig
from megatron_gppo.datatypes import Prompt
from megatron_gppo.evaluate.benchmarks import Benchmark
from megatron_gppo.evaluate.records import Records, made_with
from megatron_gppo.evaluate.report import REPORT, Report, score, write_report
from megatron_gppo.rollout.dispatch import Dispatcher, EngineSource
from megatron_gppo.rollout.generate import GroupGenerator, Judge, Progress, RolloutCancelled


class Evaluator:
    """Evaluates whatever weights the engines hold. Draws no random numbers in this process, so training around it is
    what it would have been."""

    def __init__(
        self,
        rollout: RolloutConfig,
        reward: RewardConfig,
        engines: EngineSource,
        judge: Judge,
        benchmarks: Sequence[Benchmark],
    ) -> None:
        self._rollout = rollout
        self._reward = reward
        self._engines = engines
        self._judge = judge
        self._benchmarks = benchmarks
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    def settings(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """All that the records depend on. identity: what tells the model from others."""
        judged_by = self._reward.model_dump(include={"function", "scope", "after_think", "correct_above"})
        benchmarks = {of.name: of.settings for of in self._benchmarks}
        return {"model": dict(identity), "reward": judged_by, "benchmarks": benchmarks}

    def has_done(self, folder: Path, identity: Mapping[str, Any]) -> bool:
        """Whether the folder has the report of just this evaluation."""
        return (folder / REPORT).exists() and made_with(folder, self.settings(identity))

    def run(
        self,
        folder: Path,
        model: str,
        identity: Mapping[str, Any],
        *,
        policy_version: int | None = None,
        on_progress: Progress = lambda done, wanted: None,
    ) -> Report:
        """Evaluates all problems that the folder has no records of yet, and writes the report there.

        identity: what tells the model from others, so that no records of another one are taken for its own.
        policy_version: demanded of the engines' weights, unless None. Raises EngineError, RewardError, EvaluationError,
        RolloutCancelled, and EnginesNeedWeights.
        """
        records = Records(folder, self.settings(identity), [of.name for of in self._benchmarks])
        started = time.monotonic()
        counts, seconds = asyncio.run(self._cancellable(records, policy_version, on_progress))
        seconds["total"] = time.monotonic() - started
        scores = {of.name: score(of, records.results[of.name]) for of in self._benchmarks}
        report = Report(model, scores, dict(counts), seconds)
        write_report(folder, report)
        return report

    def cancel(self) -> None:
        """Makes run(), now or later, raise RolloutCancelled soon. Safe to call from a signal handler."""
        self._cancelled = True
        if (task := self._task) is not None:
            with contextlib.suppress(RuntimeError):  # its loop, in another thread, has just closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    async def _cancellable(
        self, records: Records, policy_version: int | None, on_progress: Progress
    ) -> tuple[Counter[str], dict[str, float]]:
        self._task = asyncio.current_task()
        try:
            if self._cancelled:
                raise RolloutCancelled
            return await self._generate(records, policy_version, on_progress)
        except asyncio.CancelledError:
            if self._cancelled:
                raise RolloutCancelled from None
            raise
        finally:
            self._task = None

    async def _generate(
        self, records: Records, policy_version: int | None, on_progress: Progress
    ) -> tuple[Counter[str], dict[str, float]]:
        dispatcher = Dispatcher(self._engines, self._rollout, concurrency=self._rollout.responses_at_once)
        wanted = sum(len(benchmark.prompts) for benchmark in self._benchmarks)
        done = sum(map(len, records.results.values()))

        async def answer(benchmark: Benchmark, generator: GroupGenerator, prompt: Prompt) -> None:
            nonlocal done
            group = await generator.group(prompt)
            records.add(benchmark.name, group)
            done += 1
            on_progress(done, wanted)

        on_progress(done, wanted)
        generators, work = [], []
        for benchmark in self._benchmarks:
            generator = GroupGenerator(
                dispatcher, self._judge, benchmark.sampling, benchmark.samples, policy_version=policy_version
            )
            generators.append(generator)
            known = records.results[benchmark.name]
            work += [answer(benchmark, generator, prompt) for prompt in benchmark.prompts if prompt.row not in known]
        await dispatcher.all(work)
        counts: Counter[str] = Counter()
        for generator in generators:
            counts.update(generator.counts)
        return counts, {
            phase: sum(generator.seconds[phase] for generator in generators) for phase in generators[0].seconds
        }
