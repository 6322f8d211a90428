"""Evaluation within a run: every eval.every steps and before the first, on the engines that training uses.

Rank 0 evaluates in a thread; meanwhile it meets the other ranks every few seconds, so that no collective operation waits
for as long as a benchmark takes. Where steps are generated ahead, it waits for the one under way, and the next begins after
it: the two do not share engines, and a benchmark's time is its own. Nothing of training is touched: prompts and random states stay where they are.
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from megatron_gppo.config import Config, EvalConfig
from megatron_gppo.evaluate.evaluator import Evaluator
from megatron_gppo.evaluate.report import REPORT, Report
from megatron_gppo.parallel import ParallelState
from megatron_gppo.rollout.dispatch import EnginesNeedWeights
from megatron_gppo.rollout.generate import Progress, RolloutCancelled

MEETING_INTERVAL_S = 10.0
EVALUATIONS = "eval"  # in run.dir


def is_due(config: EvalConfig, step: int) -> bool:
    """Whether a run evaluates after this step; step 0 is before training."""
    return config.every is not None and step % config.every == 0 and (step > 0 or config.before_training)


def is_complete(config: Config, step: int) -> bool:
    """Whether no evaluation after this step is left to do."""
    return not is_due(config.eval, step) or (_folder(config, step) / REPORT).exists()


class TrainingEvaluations:
    """Rank 0's evaluations of a run, each in run.dir/eval/step_*. One at a time."""

    def __init__(
        self,
        config: Config,
        evaluator: Evaluator,
        on_report: Callable[[int, Report], None],
        *,
        step: int,
        on_progress: Progress = lambda done, wanted: None,
        engines_to_itself: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """step: the last one done. Later evaluations, of steps that the run has lost, are deleted. engines_to_itself: a
        context in which nothing else is generated; entering it may take as long as what is being generated."""
        self._engines_to_itself = engines_to_itself
        self._on_progress = on_progress
        self._config = config
        self._evaluator = evaluator
        self._on_report = on_report
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        for folder in (config.run.dir / EVALUATIONS).glob("step_" + 8 * "[0-9]"):  # not of megatron-gppo eval
            if folder > _folder(config, step):
                shutil.rmtree(folder)

    def start(self, step: int) -> None:
        """Begins to evaluate the weights of this version, or goes on; does nothing when that is complete."""
        if not self._evaluator.has_done(_folder(self._config, step), self._identity(step)):
            self._failure = None
            self._thread = threading.Thread(target=self._run, args=(step,), name="evaluation", daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, or was cancelled, within the time. Raises what Evaluator.run raises."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
            if self._failure is not None and not isinstance(self._failure, RolloutCancelled):
                raise self._failure
        return True

    def cancel(self) -> None:
        """Ends the evaluation, and all later ones, soon. Safe to call from a signal handler."""
        self._evaluator.cancel()

    def _run(self, step: int) -> None:
        try:
            with self._engines_to_itself():
                report = self._evaluator.run(
                    _folder(self._config, step),
                    f"step {step}",
                    self._identity(step),
                    policy_version=step,
                    on_progress=self._on_progress,
                )
            self._on_report(step, report)
        except BaseException as failure:  # wait() raises it, in the thread that can end the run
            self._failure = failure

    def _identity(self, step: int) -> dict[str, Any]:
        return {"start": str(self._config.model.checkpoint or self._config.model.hf_path), "step": step}


def evaluate_if_due(
    config: Config,
    parallel: ParallelState,
    evaluations: TrainingEvaluations | None,
    step: int,
    give_weights: Callable[[], None],
) -> None:
    """Called by every rank after a step, with evaluations on rank 0. give_weights: called by every rank when none but
    restarted engines are left. Raises EngineError and RewardError, or PeerFailed."""
    if not is_due(config.eval, step):
        return

    def start() -> None:
        assert evaluations is not None
        evaluations.start(step)

    def state() -> Literal["over", "under way", "engines need weights"]:
        assert evaluations is not None
        try:
            return "over" if evaluations.wait(MEETING_INTERVAL_S) else "under way"
        except EnginesNeedWeights:
            return "engines need weights"

    parallel.from_rank_0(start)
    while (now := parallel.from_rank_0(state)) != "over":
        if now == "engines need weights":
            give_weights()
            parallel.from_rank_0(start)


def _folder(config: Config, step: int) -> Path:
    return config.run.dir / EVALUATIONS / f"step_{step:08d}"
