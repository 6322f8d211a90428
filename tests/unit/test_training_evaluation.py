"""Evaluation within a run: when it is due, that it goes on, and that training around it stays what it was."""

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gppo.config import Config, EvalConfig
from megatron_gppo.data import PromptStream
from megatron_gppo.datatypes import Prompt, Response, Rollout, Verdict
from megatron_gppo.evaluate import Evaluator, Report
from megatron_gppo.evaluate import training as training_module
from megatron_gppo.evaluate.training import TrainingEvaluations, evaluate_if_due, is_complete, is_due
from megatron_gppo.rollout.engine import EngineError, EngineFaultError
from megatron_gppo.rollout.generate import EngineRollouts
from tests.support.fake_engine import FakeEngine, FakeJudge, FixedEngines, ReturningEngines
from tests.support.policy_shards import SINGLE
from tests.support.rollout import make_config
from tests.unit.test_evaluate import benchmark


def make(
    run_dir: Path, engine: FakeEngine | FixedEngines, *, judge: Any = None, step: int = 0, **eval_config: Any
) -> tuple[Config, TrainingEvaluations, list[tuple[int, Report]]]:
    config = make_config(Path("model"), run_dir).model_copy(update={"eval": EvalConfig(**{"every": 2, **eval_config})})
    problems = benchmark("b", range(100, 110))
    engines = engine if isinstance(engine, FixedEngines) else FixedEngines([engine])
    evaluator = Evaluator(config.rollout, config.reward, engines, judge or FakeJudge(), [problems])
    reports: list[tuple[int, Report]] = []
    found = TrainingEvaluations(config, evaluator, lambda step, report: reports.append((step, report)), step=step)
    return config, found, reports


def no_weights() -> None:
    raise AssertionError


def test_when_it_is_due() -> None:
    assert [step for step in range(11) if is_due(EvalConfig(every=5), step)] == [0, 5, 10]
    assert [step for step in range(11) if is_due(EvalConfig(every=5, before_training=False), step)] == [5, 10]
    assert not any(is_due(EvalConfig(), step) for step in range(11))


def test_each_step_is_evaluated_once_even_across_a_resume(tmp_path: Path) -> None:
    engine = FakeEngine(version=0)
    config, evaluations, reports = make(tmp_path, engine)
    for step in range(5):
        engine.version = step
        evaluate_if_due(config, SINGLE, evaluations, step, no_weights)
        assert is_complete(config, step)
    assert [step for step, _ in reports] == [0, 2, 4]
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [f"step_0000000{n}" for n in (0, 2, 4)]

    # The run lost everything after step 2: what was evaluated later was of other weights.
    by_command = tmp_path / "eval" / "step_00000004-0123abcd"
    by_command.mkdir()
    _, evaluations, reports = make(tmp_path, engine, step=2)
    for step in (2, 4):
        engine.version = step
        evaluate_if_due(config, SINGLE, evaluations, step, no_weights)
    assert [step for step, _ in reports] == [4]
    assert by_command.exists(), "megatron-gppo eval's"


def test_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "MEETING_INTERVAL_S", 0.01)
    at_work = threading.Event()

    class Stalls(FakeJudge):
        async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
            if prompt.row == 109:
                at_work.set()
                await asyncio.sleep(1000)
            return await super().judge(prompt, responses)

    config, evaluations, reports = make(tmp_path, FakeEngine(), judge=Stalls())
    canceller = threading.Thread(target=lambda: (at_work.wait(60), evaluations.cancel()))
    canceller.start()
    evaluate_if_due(config, SINGLE, evaluations, 0, no_weights)  # returns: the caller asks what was requested
    canceller.join()
    assert reports == []
    assert not is_complete(config, 0)
    engine = FakeEngine()
    _, evaluations, reports = make(tmp_path, engine)
    evaluate_if_due(config, SINGLE, evaluations, 0, no_weights)
    assert engine.finished < 10
    assert [report.scores["b"].problems for _, report in reports] == [10]


def test_a_failure_reaches_the_training_loop(tmp_path: Path) -> None:
    config, evaluations, _ = make(tmp_path, FakeEngine(fails_on=105))
    with pytest.raises(EngineError, match="prompt 105 failed"):
        evaluate_if_due(config, SINGLE, evaluations, 0, no_weights)


def test_engines_that_came_back_are_given_the_weights(tmp_path: Path) -> None:
    class DiesOnce(FakeEngine):
        async def generate(self, *arguments: Any, **options: Any) -> list[Response]:
            if self.finished == 4:
                self.finished += 1
                raise EngineFaultError("it died")
            return await super().generate(*arguments, **options)

    engine = DiesOnce()
    engines = ReturningEngines([engine])
    config, evaluations, reports = make(tmp_path, engines)
    evaluate_if_due(config, SINGLE, evaluations, 0, engines.given)
    assert not engines.reasons
    assert [report.scores["b"].problems for _, report in reports] == [10]
    assert engine.finished < 20, "what was done before was kept"


def test_training_is_what_it_would_have_been(tmp_path: Path) -> None:
    """The same prompts in the same order, the same rollouts, and random states that nobody has touched."""
    prompts = [Prompt(row, [row], f"{row}", f"{row}", "s") for row in range(10)]

    def run(every: int | None, resume_after: int) -> tuple[list[Rollout], list[Any]]:
        for seeding in (random.seed, np.random.seed, torch.manual_seed):
            seeding(7)
        engine, rollouts, draws = FakeEngine(), [], []
        position = 0
        folder = tmp_path / f"{every}-{resume_after}"
        for first, last in ((0, resume_after), (resume_after, 6)):  # two processes of a run that is interrupted
            config, evaluations, _ = make(folder, engine, step=first, every=every, before_training=True)
            stream = PromptStream(prompts, shuffle=True, seed=1, position=position)
            source = EngineRollouts(
                config.rollout, FixedEngines([engine]), stream, FakeJudge({3}), prompts_per_update=1
            )
            engine.version = first
            evaluate_if_due(config, SINGLE, evaluations, first, no_weights)
            for step in range(first + 1, last + 1):
                rollout = source.next(step, policy_version=step - 1)
                rollouts.append(Rollout(rollout.groups, rollout.counts, {}))
                draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
                engine.version = step
                evaluate_if_due(config, SINGLE, evaluations, step, no_weights)
            position = stream.position
        return rollouts, draws

    without = run(None, 6)
    assert run(1, 6) == without
    assert run(2, 3) == without
