"""Training: start with ``torchrun --nproc-per-node N -m megatron_gppo.train --config FILE.yaml [section.key=value ...]``.

Rank 0 also generates: it sends prompts to the engines, has the answers judged, and gives every rank the samples. All
ranks hold the policy and, after every step, give its weights to the engines.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from megatron_gppo import entropy_trace
from megatron_gppo.algorithm import after_step, samples_from_groups, values_in_force
from megatron_gppo.config import Config, ConfigError, load_config
from megatron_gppo.convert import Architecture
from megatron_gppo.datatypes import Rollout, Sample
from megatron_gppo.drift import WorstSample, worst_sample, write_alarm
from megatron_gppo.errors import MISTAKES, REPORTED, exit_status
from megatron_gppo.evaluate import EvaluationError
from megatron_gppo.evaluate.training import evaluate_if_due, is_complete
from megatron_gppo.interrupts import Interrupts
from megatron_gppo.job import join_job
from megatron_gppo.metrics import Phases
from megatron_gppo.packing import pack_updates
from megatron_gppo.parallel import PeerFailed
from megatron_gppo.plan import make_plan, render, render_built
from megatron_gppo.policy import (
    BuildError,
    CheckpointError,
    Progress,
    checkpoint,
    initialize_distributed,
    initialize_model_parallel,
    parameters_built,
    shut_down,
)
from megatron_gppo.rollout.dispatch import EnginesNeedWeights
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.generate import RolloutCancelled, RolloutError
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.rollout.reward_pool import RewardError
from megatron_gppo.run import CHECKPOINTS, Run, build_policy, connect, start_node_engines, start_services
from megatron_gppo.scalars import in_force_scalars, sample_texts, step_histograms, step_scalars
from megatron_gppo.watchdog import PeerGone, Watchdog, ended_if_late
from megatron_gppo.weight_sync import WeightSync, WeightSyncError


def train_step(run: Run, done: Progress) -> Progress | None:
    """One rollout batch: generate, score, update, sync, save, log. None if it was cancelled while generating."""
    config, policy, parallel, phases = run.config, run.policy, run.parallel, Phases(run.watchdog.enter)
    step = done.step + 1

    with phases("rollout"), saved_if_engines_fail(run, done):  # judged groups on rank 0, samples everywhere
        rollout, samples = generate(run, step)
        if samples is None:
            return None
        run.if_colocated(EnginePool.release_memory)

    with phases("score"):  # this rank's packed micro-batches, with the log-probs of the policy as it is now
        updates = pack_updates(
            samples,
            groups_per_update=config.train.prompts_per_update,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            alignment=policy.alignment,
            sequence_alignment=policy.sequence_alignment,
            microbatches_multiple_of=policy.microbatches_multiple_of,
        )
        batches = policy.add_old_logprobs(updates)
        worst = worst_sample(batches, samples, parallel)

    with phases("train"):  # several optimizer steps against the same old log-probs
        in_force = values_in_force(config, step, range(done.updates, done.updates + len(batches)), done.entropy_control)
        stats = [policy.update(batch, values) for batch, values in zip(batches, in_force, strict=True)]
    progress = Progress(
        step=step,
        updates=done.updates + len(stats),
        data_position=rollout.data_position if rollout is not None else 0,  # rank 0 writes it
        entropy_trace=entropy_trace.extended(done.entropy_trace, stats),
        entropy_control=after_step(config.algorithm, done.entropy_control, step, stats),
    )

    routing: dict[str, float] = {}
    probes = step % config.sync.verify_every == 0
    with saved_if_engines_fail(run, progress), whole_responses(run, phases, probes), phases("sync"):
        if run.sync is not None:
            run.if_colocated(EnginePool.resume_memory)
            run.sync.sync(policy.shards(), version=step)
            if probes:
                routing = probe(run, run.sync, samples[0])

    with phases("checkpoint"):
        if step % config.run.save_every == 0 or step == config.train.steps:
            save(run, progress)

    run.watchdog.enter("log")
    if run.logger is not None and rollout is not None:
        scalars = (
            step_scalars(step, rollout, stats, progress.entropy_trace, phases.seconds)
            | in_force_scalars(in_force)
            | routing
        )
        texts = sample_texts(rollout, config.run.log_samples)
        run.logger.log_step(step, scalars, texts, step_histograms(stats))
        warn_of_drift(config, step, worst, rollout)
    return progress


def generate(run: Run, step: int) -> tuple[Rollout | None, list[Sample] | None]:
    """The step's rollout on rank 0, and its samples on every rank; (None, None) if the user cancelled it.

    When none but restarted engines are left, all ranks give them the weights, and it goes on.
    """
    rollout: Rollout | None = None

    def samples_of_rollout() -> list[Sample] | Literal["engines need weights"] | None:
        nonlocal rollout
        assert run.rollouts is not None
        try:
            rollout = run.rollouts.next(step, policy_version=step - 1)
        except RolloutCancelled:
            return None
        except EnginesNeedWeights:
            return "engines need weights"
        config = run.config
        return samples_from_groups(
            rollout.groups, advantage=config.algorithm.advantage, mask_truncated=config.train.mask_truncated
        )

    while (samples := run.parallel.from_rank_0(samples_of_rollout)) == "engines need weights":
        sync_again(run, version=step - 1)
    return rollout, samples


def sync_again(run: Run, version: int) -> None:
    """Gives the weights of a step that is done to engines that came back since."""
    assert run.sync is not None
    run.sync.sync(run.policy.shards(), version)


@contextmanager
def whole_responses(run: Run, phases: Phases, probes: bool) -> Iterator[None]:
    """Without async.partial_rollouts, no response is in flight in the body; waiting for those that are is time for rollouts.

    Nor is any where it probes: engines would answer a probe after all that they have been asked before, too late.
    """
    with ExitStack() as stack:

        def pause() -> None:
            if run.ahead is not None:
                stack.enter_context(run.ahead.paused())

        if run.config.async_.staleness > 0 and (probes or not run.config.async_.partial_rollouts):
            with phases("rollout"):
                run.parallel.from_rank_0(pause)
        yield


def evaluate(run: Run, progress: Progress) -> None:
    """What eval.every asks for at this step. After an interruption it goes on where it stopped."""
    run.watchdog.enter("evaluation")
    with saved_if_engines_fail(run, progress):
        step = progress.step
        evaluate_if_due(run.config, run.parallel, run.evaluations, step, lambda: sync_again(run, version=step))


def probe(run: Run, sync: WeightSync, sample: Sample) -> dict[str, float]:
    """Compares log-probs of one sample between policy and engines. Raises WeightSyncError if they differ.

    Returns the scalars of a mixture: how far they differ in the experts that they choose.
    """
    token_ids = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
    with run.policy.chosen_experts() as chosen:
        logprobs = run.policy.sequence_logprobs(token_ids)
    sync.verify_probe(token_ids, logprobs)
    experts = chosen.gather(len(token_ids))
    difference = None if experts is None else sync.routing_difference(token_ids, experts)
    return {} if difference is None else {"engine/routing_difference": difference}


def warn_of_drift(config: Config, step: int, worst: WorstSample | None, rollout: Rollout) -> None:
    if worst is not None and not worst.difference <= config.rollout.logprob_alarm:
        path = write_alarm(config.run.dir / "alarms", step, worst, rollout)
        print(
            f"warning: step {step}: engine and policy log-probs of a sample differ by {worst.difference:.3g} nats a token on average, "
            f"more than rollout.logprob_alarm = {config.rollout.logprob_alarm:g}; kept in {path}",
            file=sys.stderr,
        )


@contextmanager
def saved_if_engines_fail(run: Run, progress: Progress) -> Iterator[None]:
    """Saves what is done before such a failure, which all ranks see at the same point, ends the run."""
    try:
        yield
    # OSError: a rollout that could not be recorded, a reward worker that could not be started.
    except (EngineError, EvaluationError, RolloutError, RewardError, WeightSyncError, PeerFailed, OSError) as error:
        run.watchdog.enter("checkpoint", f"after {error}")
        save(run, progress)
        raise


def save(run: Run, progress: Progress) -> None:
    """Writes a checkpoint, unless it is there, and deletes the oldest."""
    checkpoints = run.config.run.dir / CHECKPOINTS
    folder = checkpoints / checkpoint.folder_name(progress.step)
    if run.parallel.from_rank_0(lambda: folder != checkpoint.newest(checkpoints)):
        checkpoint.save(folder, run.policy, progress, run.config.model.hf_path)
        run.parallel.from_rank_0(lambda: checkpoint.prune(checkpoints, run.config.run.keep_last))


def train(config: Config, architecture: Architecture) -> signal.Signals | None:
    """Runs the steps that are left. Called by every rank that torchrun started.

    Returns the signal that ended the run early, its progress saved; None when the last step is done.
    """
    with ExitStack() as stack:
        # First what can fail, and what takes long to start: no GPU is held meanwhile.
        services = None
        if os.environ["RANK"] == "0":
            with ended_if_late("rank 0, data, rewards and engines before it joins", config.run.collective_timeout_s):
                services = start_services(config, architecture, stack)
        start_node_engines(config, stack)
        job = join_job(config)
        watchdog = stack.enter_context(Watchdog(config, job))
        stack.callback(shut_down)
        with watchdog.naming_failures():
            initialize_distributed(config, job)
            parallel = initialize_model_parallel(config)
            policy, progress = build_policy(config, architecture, parallel, watchdog)
            run = connect(config, parallel, policy, progress, services, watchdog, stack)
        return train_steps(run, progress)


def train_steps(run: Run, progress: Progress) -> signal.Signals | None:
    """The steps that are left. Returns as train does."""
    run.watchdog.when_asked_to_stop(run.cancel)
    # Failures are named inside: torchrun sends SIGTERM as soon as it sees that a rank is gone.
    with Interrupts(run.cancel) as interrupts, run.watchdog.naming_failures():
        evaluate(run, progress)
        while (signum := first_request(run, interrupts)) is None and progress.step < run.config.train.steps:
            advanced = train_step(run, progress)
            if advanced is not None:
                progress = advanced
                evaluate(run, progress)
        if signum is not None:
            run.watchdog.enter("checkpoint", f"after {signum.name}")
            save(run, progress)
        return signum


def first_request(run: Run, interrupts: Interrupts) -> signal.Signals | None:
    """The signal that any rank has received, the same on every rank."""
    return next((signum for signum in run.parallel.gather(interrupts.requested) if signum is not None), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns its exit status: 0 done, 1 failed, 2 a mistake in the configuration, 128 + a signal."""
    parser = argparse.ArgumentParser(prog="megatron_gppo.train", description="Train with CE-GPPO.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see the README for its fields")
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration and layout, print the plan, and stop"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for so many ranks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the file")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    world_size = options.world_size if options.dry_run and options.world_size else int(os.environ.get("WORLD_SIZE", 1))
    try:
        config = load_config(options.config, options.overrides)
        architecture = Architecture.from_hf(config.model.hf_path)
        plan = make_plan(config, architecture, world_size)
        if rank == 0:
            print(render(plan), flush=True)
        if options.dry_run:
            print(render_built(plan, parameters_built(config, world_size)))
            return 0
        found = checkpoint.newest(config.run.dir / CHECKPOINTS)
        if (
            config.run.resume == "auto"
            and found is not None
            and checkpoint.read_progress(found).step >= config.train.steps
            and is_complete(config, config.train.steps)
        ):
            if rank == 0:
                print(f"nothing to do: {found} has all of train.steps = {config.train.steps}")
            return 0
        if "RANK" not in os.environ:
            raise ConfigError(
                "this process was not started by torchrun. Fix: torchrun --nproc-per-node N -m megatron_gppo.train "
                "--config FILE, or megatron-gppo train --config FILE"
            )
        ended_by = train(config, architecture)
    except (*REPORTED, BuildError, CheckpointError) as error:
        # Mistakes are found by every rank alike.
        if rank == 0 or not isinstance(error, MISTAKES):
            print(f"error: {error}", file=sys.stderr)
        return exit_status(error)
    except (PeerFailed, PeerGone):  # the peer says why; or said already
        return 1
    except KeyboardInterrupt:  # before the first step, or a second time
        return 128 + signal.SIGINT
    if ended_by is not None and rank == 0:
        print(f"ended by {ended_by.name}; progress is saved, and the same command goes on from there", file=sys.stderr)
    return 0 if ended_by is None else 128 + ended_by


if __name__ == "__main__":
    sys.exit(main())
