"""What a run shows: TensorBoard, one console line a step, a progress bar while it generates."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

GIB = 2**30

# Every tag of TensorBoard; its x axis is the step. Users build on these names: a change of one is a breaking change.
# "Tokens" are response tokens that count in the loss, over all updates of the step, unless said otherwise.
TAGS: dict[str, str] = {
    "reward/mean": "mean reward of the step's responses",
    "reward/std": "standard deviation of these rewards, over all groups",
    "reward/accuracy": "share of responses that are correct",
    "reward/timeouts": "responses whose reward function ran out of time, those of dropped groups included; they got the reward of a wrong answer",
    "reward/crashes": "responses whose reward function crashed; likewise",
    "reward/unparsable": "responses without an answer that could be parsed; likewise",
    "response/tokens_mean": "mean response length in tokens",
    "response/tokens_max": "longest response in tokens",
    "response/truncated_share": "share of responses cut at rollout.max_response_tokens",
    "rollout/groups": "groups in the step's batch",
    "rollout/degenerate_groups": "those among them whose rewards are all equal, so that they have no advantage",
    "rollout/dropped_groups": "groups that dynamic sampling generated and dropped, because their rewards were all equal",
    "rollout/missing_groups": "groups that the batch lacks after the last round of replacement",
    "rollout/surplus_groups": "groups left out so that no update is cut short",
    "rollout/retried_requests": "requests to the engines that failed and were sent again",
    "rollout/timed_out_requests": "those among them that reached rollout.request_timeout_s",
    "rollout/staleness_mean": "versions by which tokens are older than the weights that the step starts from, mean over tokens",
    "rollout/staleness_max": "the most of these; at most async.staleness",
    "rollout/mixed_responses": "share of responses with tokens of several versions of the weights",
    "rollout/carried_on_responses": "responses that a weight sync aborted, and that went on where they stopped",
    "rollout/moved_requests": "requests that began anew on another engine, after theirs failed",
    "rollout/malformed_answers": "answers of engines that cannot be used, such as log-probs that are NaN",
    "rollout/lost_engines": "engines that died, hung or answered nonsense since the rollout before",
    "rollout/lost_routers": "times that sglang-router failed since the rollout before; prompts then go to the engines directly for the rest of the run",
    "rollout/restarted_engines": "engines that serve again, with the current weights, since the rollout before",
    "rollout/serving_engines": "engines that serve, after the rollout",
    "rollout/aborted_groups": "groups that over-sampling had begun and did not need",
    "policy/loss": "the loss, mean over the step's updates",
    "policy/entropy": "entropy of the policy in nats, mean over tokens",
    "policy/kl": "approximate KL to the policy before the step (ratio - 1 - log ratio), mean over tokens",
    "policy/reference_kl": "KL to the reference policy, mean over tokens; only with algorithm.kl_coef",
    "policy/grad_norm": "gradient norm before clipping, mean over the step's updates, skipped ones left out",
    "policy/grad_norm_max": "the largest of these",
    "policy/lr": "learning rate of the step's last update",
    "policy/updates": "updates of the step, skipped ones included",
    "policy/skipped_updates": "updates that moved no weight: a gradient that is not finite, or no token in the loss",
    "ratio/mean": "mean ratio of the policy to the one before the step",
    "ratio/max": "largest ratio",
    "ratio/first_update_max_deviation": "largest |ratio - 1| in the step's first update; anything but rounding is a bug",
    "ratio/left_of_clip": "share of tokens with a ratio below 1 - clip_low",
    "ratio/right_of_clip": "share of tokens with a ratio above 1 + clip_high",
    "ratio/left_of_clip_acting": "share of tokens on which the left bound (beta1) acts: left of the clip range with a negative advantage; for cispo, any",
    "ratio/right_of_clip_acting": "share of tokens on which the right bound (beta2) acts: right of the clip range with a positive advantage; for cispo, any",
    "ratio/left_of_clip_gradient": "share of the gradient weight that tokens have on which the left bound acts; 0 for ppo_clip, dapo and gspo",
    "ratio/right_of_clip_gradient": "likewise, the right bound",
    "ratio/clamped": "tokens whose log-ratio was clamped to +-20",
    "ratio/effective_sample_size": "(sum of ratios)^2 / sum of squared ratios, as a share of the tokens",
    "ratio/histogram": "tokens by ratio, as a histogram",
    "quadrant/pa_hp_tokens": "share of tokens with a positive advantage and a high probability (from algorithm.high_probability on): lowers entropy",
    "quadrant/pa_lp_tokens": "positive advantage, low probability: raises entropy",
    "quadrant/na_hp_tokens": "negative advantage, high probability: raises entropy",
    "quadrant/na_lp_tokens": "negative advantage, low probability: lowers entropy",
    "quadrant/pa_hp_gradient": "share of the gradient weight, |d loss / d logprob| by the objective, that these tokens have",
    "quadrant/pa_lp_gradient": "likewise",
    "quadrant/na_hp_gradient": "likewise",
    "quadrant/na_lp_gradient": "likewise",
    "probability/clipped": "mean probability of tokens on which a bound acts",
    "probability/unclipped": "mean probability of all others",
    "entropy/covariance": "Eq. 7: covariance of log pi and pi A over tokens. Positive: the entropy should fall",
    "entropy/sign_agreement": "share of the last 100 steps in which the mean entropy then moved as the covariance's sign says",
    "entropy/covariance_correlation": "correlation of -covariance with the entropy's change to the next step, over the last 100 steps",
    "algorithm/beta1": "beta1 in force in the step; only with ce_gppo",
    "algorithm/beta2": "beta2 in force in the step; only with ce_gppo",
    "algorithm/clip_low": "clip_low in force in the step",
    "algorithm/clip_high": "clip_high in force in the step",
    "algorithm/entropy_coef": "weight of the entropy bonus in force in the step",
    "algorithm/entropy_target": "entropy in nats that the entropy controller aims at; only with algorithm.entropy_target",
    "engine/logprob_difference_mean": "mean |log-prob by the policy - log-prob by the engine| in nats; of the same weights, unless async.staleness lets the engine's be older",
    "engine/logprob_difference_max": "the largest of these",
    "engine/logprob_difference_bias": "their mean with sign, policy minus engine",
    "engine/routing_difference": "share of the experts that the policy chooses for a probe's tokens and an engine does not, every "
    "sync.verify_every steps; only with a mixture, and engines that have server_args.enable_return_routed_experts",
    "engine/importance_weight": "mean weight of the correction for the engine; only with algorithm.importance_correction",
    "engine/importance_corrected": "share of tokens whose weight was truncated or masked; likewise",
    "engine/importance_effective_sample_size": "(sum of weights)^2 / sum of squared weights, as a share of the tokens; likewise",
    "seconds/step": "the whole step",
    "seconds/rollout": "generation and rewards, as the training loop waits for them",
    "seconds/generate": "generation alone; overlaps with rewards",
    "seconds/reward": "rewards alone; overlap with generation",
    "seconds/score": "log-probs before the first update, those of the reference policy included",
    "seconds/train": "the updates",
    "seconds/sync": "weights to the engines",
    "seconds/checkpoint": "saving a checkpoint",
    "throughput/tokens_per_s": "prompt and response tokens of the batch per second of the step",
    "throughput/generated_tokens_per_s": "response tokens of the batch per second of generation",
    "memory/resident_gib": "resident memory of rank 0",
    "memory/gpu_peak_gib": "most GPU memory that rank 0 held so far; only with CUDA",
    "samples": "a few prompts, responses and rewards, as text",
}

# Tags with a NAME of the user's in them, which are there only where such a part or benchmark is configured.
TAG_FAMILIES: dict[str, str] = {
    "reward_part/NAME": "mean of one part of a reward that is a sum: answer, format, overlong, or one of reward.extra, weighted",
    "eval/average": "mean accuracy over all benchmarks; the x axis is the step whose weights were evaluated, here and below",
    "eval/NAME/accuracy": "a benchmark's avg@k",
    "eval/NAME/pass": "its pass@k, k being its samples",
    "eval/NAME/majority": "its maj@k",
    "eval/NAME/truncated_share": "share of its responses cut at max_response_tokens",
    "eval/NAME/tokens_mean": "its mean response length in tokens",
    "eval/seconds": "the whole evaluation",
}
NAME_PATTERN = r"[^/]+"


class Histogram(NamedTuple):
    """Counts of values, by bucket."""

    upper_bounds: np.ndarray  # [B], ascending; a bucket reaches down to the bound of the one before it
    counts: np.ndarray  # [B]
    sum: float  # of the values
    sum_squares: float


class Column(NamedTuple):
    """A number on the console line."""

    heading: str
    tag: str
    format: str
    scale: float = 1.0


COLUMNS = (
    Column("reward", "reward/mean", "7.3f"),
    Column("length", "response/tokens_mean", "8.1f"),
    Column("entropy", "policy/entropy", "7.4f"),
    Column("left %", "ratio/left_of_clip", "6.2f", 100.0),
    Column("right %", "ratio/right_of_clip", "7.2f", 100.0),
    Column("KL old", "policy/kl", "8.1e"),
    Column("grad norm", "policy/grad_norm", "9.3g"),
    Column("rollout s", "seconds/rollout", "9.1f"),
    Column("train s", "seconds/train", "7.1f"),
    Column("sync s", "seconds/sync", "6.1f"),
    Column("tok/s", "throughput/tokens_per_s", "7.0f"),
)
LINES_PER_HEADING = 20
SECONDS_PER_PROGRESS_LINE = 60.0  # where there is no terminal to draw a bar in


class Phases:
    """Seconds by phase, of one step: from the creation of this object on. on_enter hears of each phase."""

    def __init__(self, on_enter: Callable[[str], None] = lambda phase: None) -> None:
        self._on_enter = on_enter
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to its phase."""
        self._on_enter(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, and "step" for everything until now."""
        return {**self._phases, "step": time.perf_counter() - self._start}


class MetricsLogger:
    """Rank 0's TensorBoard file and console."""

    def __init__(self, run_dir: Path, *, first_step: int, num_steps: int, console: Console | None = None):
        """Steps count from 1. first_step is the first that this process logs: curves that an interrupted run drew from
        there on are replaced. num_steps is the last one of the run."""
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._console = console or Console()
        self._num_steps = num_steps
        self._lines = 0
        self._recent_seconds: deque[float] = deque(maxlen=10)
        self._bar: Progress | None = None
        self._generation_start = self._last_progress = 0.0

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_bar()
        self._writer.close()

    def log_step(
        self,
        step: int,
        scalars: Mapping[str, float],
        texts: Sequence[str] = (),
        histograms: Mapping[str, Histogram] | None = None,
    ) -> None:
        """Writes a step's scalars and histograms, whose tags TAGS documents, and its sample texts, and prints its line."""
        scalars = {**scalars, **memory_scalars()}
        self._write(step, scalars)
        for tag, histogram in (histograms or {}).items():
            self._write_histogram(step, tag, histogram)
        if texts:
            self._writer.add_text("samples", "\n\n---\n\n".join(texts), step)
        self._writer.flush()

        self._end_bar()  # still there when the step got fewer groups than it wanted
        if "seconds/step" in scalars:
            self._recent_seconds.append(scalars["seconds/step"])
        if self._lines % LINES_PER_HEADING == 0:
            self._print(self._heading(), style="bold")
        self._print(self._line(step, scalars))
        self._lines += 1

    def log_evaluation(self, step: int, scalars: Mapping[str, float], line: str) -> None:
        """Writes an evaluation's scalars, which TAG_FAMILIES documents, and prints the line. From any thread."""
        self._write(step, scalars)
        self._writer.flush()
        self._print(line)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        _check_documented(scalars)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def _write_histogram(self, step: int, tag: str, histogram: Histogram) -> None:
        _check_documented([tag])
        occupied = histogram.upper_bounds[histogram.counts > 0]
        self._writer.add_histogram_raw(
            tag,
            min=occupied[0],
            max=occupied[-1],
            num=histogram.counts.sum(),
            sum=histogram.sum,
            sum_squares=histogram.sum_squares,
            bucket_limits=histogram.upper_bounds.tolist(),
            bucket_counts=histogram.counts.tolist(),
            global_step=step,
        )

    def on_progress(self, done: int, wanted: int) -> None:
        """Shows how many of the step's groups are there: a bar in a terminal, elsewhere a line now and then."""
        if done == 0:
            self._generation_start = self._last_progress = time.monotonic()
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("generating"),
                    BarColumn(bar_width=40),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bar.add_task("", total=wanted)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=done)
            if done == wanted:
                self._end_bar()
        elif time.monotonic() - self._last_progress >= SECONDS_PER_PROGRESS_LINE:
            self._last_progress = time.monotonic()
            self._print(
                f"generating: {done}/{wanted} groups after {self._last_progress - self._generation_start:.0f} s"
            )

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _step_width(self) -> int:
        return max(len("step"), 2 * len(str(self._num_steps)) + 1)

    def _heading(self) -> str:
        headings = [_width(column, column.heading) for column in COLUMNS]
        return "  ".join([f"{'step':>{self._step_width()}}", *headings, f"{'ETA':>8}"])

    def _line(self, step: int, scalars: Mapping[str, float]) -> str:
        numbers = [
            _width(column, format(scalars[column.tag] * column.scale, column.format) if column.tag in scalars else "-")
            for column in COLUMNS
        ]
        eta = "-"
        if self._recent_seconds:
            seconds_per_step = sum(self._recent_seconds) / len(self._recent_seconds)
            eta = str(timedelta(seconds=round((self._num_steps - step) * seconds_per_step)))
        return "  ".join([f"{f'{step}/{self._num_steps}':>{self._step_width()}}", *numbers, f"{eta:>8}"])

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def is_documented(tag: str) -> bool:
    """Whether TAGS or TAG_FAMILIES has it."""
    families = (re.escape(family).replace("NAME", NAME_PATTERN) for family in TAG_FAMILIES)
    return tag in TAGS or any(re.fullmatch(family, tag) for family in families)


def _check_documented(tags: Iterable[str]) -> None:
    undocumented = sorted(tag for tag in tags if not is_documented(tag))
    assert not undocumented, f"not in TAGS: {undocumented}"


def memory_scalars() -> dict[str, float]:
    """Memory of this process now."""
    scalars = {"memory/resident_gib": psutil.Process().memory_info().rss / GIB}
    if torch.cuda.is_available():
        scalars["memory/gpu_peak_gib"] = torch.cuda.max_memory_reserved() / GIB
    return scalars


def _width(column: Column, text: str) -> str:
    return f"{text:>{int(column.format.split('.')[0])}}"
