"""What a run works with, and how it comes to have it: the run folder, engines, rewards, the policy's weights."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch

from megatron_gppo.config import Config, ConfigError, dump_config
from megatron_gppo.convert import Architecture, convert_hf_to_megatron
from megatron_gppo.data import PromptSet, PromptStream, load_tokenizer
from megatron_gppo.evaluate import Benchmark, Evaluator, load_benchmarks
from megatron_gppo.evaluate.report import Report, headline, scalars
from megatron_gppo.evaluate.training import TrainingEvaluations
from megatron_gppo.metrics import MetricsLogger
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy import Policy, Progress, checkpoint
from megatron_gppo.rollout.ahead import AheadRollouts
from megatron_gppo.rollout.generate import EngineRollouts, Judge, RolloutSource
from megatron_gppo.rollout.launch import launched_engines, launched_node_engines
from megatron_gppo.rollout.pieces import Staleness
from megatron_gppo.rollout.placement import Node
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.rollout.record import RecordingRollouts, ReplayRollouts
from megatron_gppo.rollout.rewards import OverlongPenalty, Rewards
from megatron_gppo.training_prompts import (
    check_unchanged,
    load_training_prompts,
    without_unreadable_answers,
    write_decontamination_report,
)
from megatron_gppo.watchdog import Watchdog
from megatron_gppo.weight_sync import WeightSync, check_host

# In run.dir:
CHECKPOINTS = "checkpoints"
CONVERTED = "initial"  # model.hf_path in Megatron's format, unless model.checkpoint names one


@dataclass(frozen=True, slots=True)
class Run:
    """What the steps of a run work with."""

    config: Config
    parallel: ParallelState
    policy: Policy
    sync: WeightSync | None  # None in replay: there is no engine
    rollouts: RolloutSource | None  # rank 0 only, like all below
    logger: MetricsLogger | None
    watchdog: Watchdog
    evaluations: TrainingEvaluations | None = None  # None in replay
    engines: EnginePool | None = None  # likewise
    ahead: AheadRollouts | None = None  # async.staleness > 0: what is behind rollouts

    def if_colocated(self, action: Callable[[EnginePool], None]) -> None:
        """Collective: where engines share the ranks' GPUs, has it done before any rank goes on."""
        if self.config.rollout.placement == "colocated" and self.sync is not None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what this rank does not use now is for the engines
            self.parallel.from_rank_0(lambda: action(self.engines) if self.engines is not None else None)

    def cancel(self) -> None:
        """Ends generation, and waiting for engines, now and later, soon. Safe to call from any thread of any rank."""
        if self.parallel.rank != 0:
            self.watchdog.ask_to_stop()
        for waiting in (self.rollouts, self.evaluations, self.engines):
            if waiting is not None:
                waiting.cancel()


@dataclass(frozen=True, slots=True)
class Services:
    """What rank 0 starts before the policy is built."""

    prompts: PromptSet
    benchmarks: Sequence[Benchmark]
    rewards: Rewards
    engines: EnginePool
    decode: Callable[[list[int]], str]  # token ids to text, without special tokens


def start_services(config: Config, architecture: Architecture, stack: ExitStack) -> Services | None:
    """Prepares the run folder and starts rewards and engines, which end with the stack. None in replay."""
    prepare_run_folder(config, architecture)
    if config.rollout.mode == "replay":
        return None
    check_host(config.sync)
    tokenizer = load_tokenizer(config.model.hf_path)
    benchmarks: list[Benchmark] = []
    if config.eval.every is not None or config.data.decontamination_ngram is not None:
        benchmarks = load_benchmarks(config, tokenizer, architecture.max_position_embeddings)
    prompts, contaminated = load_training_prompts(config, tokenizer, benchmarks)
    if config.data.decontamination_ngram is not None:
        write_decontamination_report(config.run.dir, contaminated)
    rewards = Rewards(config.reward)
    stack.callback(rewards.close)
    engines = stack.enter_context(launched_engines(config))
    prompts = without_unreadable_answers(prompts, rewards, config)  # while the engines start
    if (summary := prompts.summary()) is not None:
        print(f"data.train: {summary}")
    check_unchanged(prompts, config, resuming=checkpoint.newest(config.run.dir / CHECKPOINTS) is not None)
    return Services(
        prompts, benchmarks, rewards, engines, lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
    )


def start_node_engines(config: Config, stack: ExitStack) -> None:
    """The first rank of each further node starts the node's engines, which end with the stack; other ranks nothing."""
    if os.environ["LOCAL_RANK"] == "0" and Node.here().index > 0:
        stack.enter_context(launched_node_engines(config))


def prepare_run_folder(config: Config, architecture: Architecture) -> None:
    """Writes the resolved configuration and, if there is no checkpoint to start from, converts the model."""
    folder = config.run.dir
    found = checkpoint.newest(folder / CHECKPOINTS)
    if found is not None and config.run.resume == "never":
        raise ConfigError(f"run.dir = {folder} holds {found.name}. Fix: another run.dir, or run.resume: auto to go on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(_without_key(config)))
    except OSError as error:
        raise ConfigError(f"run.dir = {folder}: {error.strerror}. Fix: give a folder that can be written") from error
    if found is not None:
        checkpoint.check_model(found, architecture)
    if found is None or config.algorithm.kl_coef > 0:
        if config.model.checkpoint is not None:
            checkpoint.check_model(config.model.checkpoint, architecture)
        elif not (folder / CONVERTED).exists():
            convert_hf_to_megatron(config.model.hf_path, folder / CONVERTED)


def _without_key(config: Config) -> Config:
    """For a file that others may read."""
    hidden = "(not written here)" if config.rollout.api_key is not None else None
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"api_key": hidden})})


def build_policy(
    config: Config, architecture: Architecture, parallel: ParallelState, watchdog: Watchdog
) -> tuple[Policy, Progress]:
    """The policy as the run left it, or as it starts."""
    watchdog.enter("build")

    def on_microbatch() -> None:
        for phase in ("score", "train"):
            watchdog.progress(phase)

    policy = Policy(config, architecture, parallel, on_microbatch)
    watchdog.enter("load")
    return policy, restore(config, parallel, policy)


def restore(config: Config, parallel: ParallelState, policy: Policy) -> Progress:
    """Fills the policy from the run's newest checkpoint, or from where it starts; the reference policy always from there."""
    found = parallel.from_rank_0(lambda: checkpoint.newest(config.run.dir / CHECKPOINTS))
    has_reference = config.algorithm.kl_coef > 0
    if found is None or has_reference:
        checkpoint.load_weights(config.model.checkpoint or config.run.dir / CONVERTED, policy)
    if has_reference:
        policy.keep_reference()
    if found is None:
        return Progress(step=0, updates=0, data_position=0)
    progress = checkpoint.load(found, policy)
    if parallel.rank == 0:
        print(f"resumed from {found}: {progress.step} of {config.train.steps} steps are done")
    return progress


def connect(
    config: Config,
    parallel: ParallelState,
    policy: Policy,
    progress: Progress,
    services: Services | None,
    watchdog: Watchdog,
    stack: ExitStack,
) -> Run:
    """Gives the engines the policy's weights, and proves that they arrived, before the first step."""
    watchdog.enter("start", "waiting for the engines")
    logger = None
    if parallel.rank == 0:
        logger = MetricsLogger(config.run.dir, first_step=progress.step + 1, num_steps=config.train.steps)
        stack.enter_context(logger)
    if config.rollout.replay is not None:
        replay = ReplayRollouts(config.rollout.replay) if parallel.rank == 0 else None
        return Run(config, parallel, policy, None, replay, logger, watchdog)

    engines = services.engines if services is not None else None
    parallel.from_rank_0(lambda: engines.wait_ready() if engines is not None else None)
    sync = WeightSync(config, policy.architecture, parallel, engines, lambda: watchdog.progress("sync"))
    stack.callback(sync.close)
    watchdog.enter("sync", "the first")
    untouched = config.rollout.mode == "managed" and config.model.checkpoint is None and progress.step == 0
    sync.verify_start(policy.shards(), progress.step, engines_hold_policy=untouched)
    # What the engines compute from now on is what the policy computes, whatever they had loaded before.
    token_ids = parallel.from_rank_0(lambda: services.prompts.prompts[0].token_ids if services is not None else [])
    sync.verify_probe(token_ids, policy.sequence_logprobs(token_ids))
    if services is None or logger is None:
        return Run(config, parallel, policy, sync, None, None, watchdog)
    rollouts, ahead = make_rollouts(config, services, progress, logger, watchdog, stack)
    evaluations = None
    if config.eval.every is not None:
        evaluator = Evaluator(config.rollout, config.reward, services.engines, services.rewards, services.benchmarks)
        evaluations = TrainingEvaluations(
            config,
            evaluator,
            log_evaluation(logger),
            step=progress.step,
            on_progress=watchdog.reporting("evaluation"),
            engines_to_itself=nullcontext if ahead is None else ahead.paused,
        )
    return Run(config, parallel, policy, sync, rollouts, logger, watchdog, evaluations, services.engines, ahead)


def make_rollouts(
    config: Config,
    services: Services,
    progress: Progress,
    logger: MetricsLogger,
    watchdog: Watchdog,
    stack: ExitStack,
) -> tuple[RolloutSource, AheadRollouts | None]:
    """Where the steps' rollouts come from, on rank 0, and with async.staleness what generates ahead behind it."""
    prompts = PromptStream(
        services.prompts.prompts,
        shuffle=config.data.shuffle,
        seed=config.run.seed,
        position=progress.data_position,
        shares=services.prompts.shares(config.data),
    )
    overlong = config.reward.overlong
    judge: Judge = services.rewards
    if overlong is not None:
        judge = OverlongPenalty(judge, overlong, config.rollout.max_response_tokens)
    staleness, on_progress = config.async_.staleness, watchdog.reporting("rollout")
    if staleness > 0:  # an evaluation waits for the rollout that is under way
        on_progress = both(on_progress, watchdog.reporting("evaluation"))
    rollouts: RolloutSource = EngineRollouts(
        config.rollout,
        services.engines,
        prompts,
        judge,
        prompts_per_update=config.train.prompts_per_update,
        staleness=Staleness(staleness, services.decode) if staleness > 0 else None,
        on_progress=both(logger.on_progress, on_progress) if staleness == 0 else on_progress,  # a bar is for who waits
    )
    ahead = None
    if staleness > 0:
        rollouts = ahead = AheadRollouts(rollouts, staleness=staleness, last_step=config.train.steps)
        stack.callback(ahead.close)
    if config.rollout.record is not None:
        rollouts = RecordingRollouts(rollouts, config.rollout.record)
    return rollouts, ahead


def both(first: Callable[[int, int], None], second: Callable[[int, int], None]) -> Callable[[int, int], None]:
    def call(done: int, wanted: int) -> None:
        first(done, wanted)
        second(done, wanted)

    return call


def log_evaluation(logger: MetricsLogger) -> Callable[[int, Report], None]:
    """What writes the report on a step's weights where the steps' own numbers are."""
    return lambda step, report: logger.log_evaluation(step, scalars(report), headline(step, report))
