"""A step's results as the scalars and texts that metrics.TAGS documents."""

import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from megatron_gppo.algorithm import LOG_RATIO_BOUNDS, QUADRANTS, InForce, is_degenerate
from megatron_gppo.datatypes import EntropyPoint, Group, Response, Rollout, UpdateStats, Verdict
from megatron_gppo.entropy_trace import covariance, trace_scalars
from megatron_gppo.metrics import Histogram

# Rollout.counts, by tag. An event that did not happen is a 0 in TensorBoard, not a gap.
EVENTS = {
    "reward_timeout": "reward/timeouts",
    "reward_crash": "reward/crashes",
    "reward_unparsable": "reward/unparsable",
    "dropped_groups": "rollout/dropped_groups",
    "missing_groups": "rollout/missing_groups",
    "surplus_groups": "rollout/surplus_groups",
    "retried_requests": "rollout/retried_requests",
    "timed_out_requests": "rollout/timed_out_requests",
    "carried_on_responses": "rollout/carried_on_responses",
    "moved_requests": "rollout/moved_requests",
    "malformed_answers": "rollout/malformed_answers",
    "lost_engines": "rollout/lost_engines",
    "lost_routers": "rollout/lost_routers",
    "restarted_engines": "rollout/restarted_engines",
    "serving_engines": "rollout/serving_engines",
    "aborted_groups": "rollout/aborted_groups",
}


def step_scalars(
    step: int,
    rollout: Rollout,
    updates: Sequence[UpdateStats],
    trace: Sequence[EntropyPoint],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """All scalars of a step. seconds is by phase, with "step" for the whole (metrics.Phases)."""
    tokens = sum(
        len(group.prompt.token_ids) + len(response.token_ids)
        for group in rollout.groups
        for response in group.responses
    )
    return {
        **rollout_scalars(step, rollout),
        **update_scalars(updates),
        **trace_scalars(trace),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "throughput/tokens_per_s": tokens / seconds["step"],
    }


def rollout_scalars(step: int, rollout: Rollout) -> dict[str, float]:
    """Rewards, lengths, ages and events. A batch without any group has its counts only."""
    verdicts = [verdict for group in rollout.groups for verdict in group.verdicts]
    scalars = {
        "rollout/groups": len(rollout.groups),
        "rollout/degenerate_groups": sum(is_degenerate(group) for group in rollout.groups),
        **{tag: rollout.counts.get(event, 0) for event, tag in EVENTS.items()},
        **{f"seconds/{phase}": value for phase, value in rollout.seconds.items()},
    }
    if not verdicts:
        return scalars
    rewards = [verdict.reward for verdict in verdicts]
    responses = [response for group in rollout.groups for response in group.responses]
    lengths = [len(response.token_ids) for response in responses]
    scalars |= {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/accuracy": float(np.mean([verdict.correct for verdict in verdicts])),
        **{
            f"reward_part/{name}": float(np.mean([verdict.parts[name] for verdict in verdicts]))
            for name in verdicts[0].parts
        },
        "response/tokens_mean": float(np.mean(lengths)),
        "response/tokens_max": max(lengths),
        "response/truncated_share": float(np.mean([response.truncated for response in responses])),
        **staleness_scalars(step, responses),
    }
    if rollout.seconds.get("generate"):
        scalars["throughput/generated_tokens_per_s"] = sum(lengths) / rollout.seconds["generate"]
    return scalars


def staleness_scalars(step: int, responses: Sequence[Response]) -> dict[str, float]:
    """By how many versions tokens are older than the weights that the step starts from."""
    runs = [_version_runs(response.policy_versions) for response in responses]
    tokens = Counter[int]()  # by age
    for version, count in chain.from_iterable(runs):
        tokens[step - 1 - version] += count
    return {
        "rollout/staleness_mean": sum(age * count for age, count in tokens.items()) / tokens.total(),
        "rollout/staleness_max": float(max(tokens)),
        "rollout/mixed_responses": float(np.mean([len(of_response) > 1 for of_response in runs])),
    }


def _version_runs(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(version, how many tokens) of versions that never fall. All ranks wait for this, so it does not look at every token."""
    runs, start = [], 0
    while start < len(versions):
        end = bisect_right(versions, versions[start], start)
        runs.append((versions[start], end - start))
        start = end
    return runs


def update_scalars(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Losses, ratios and gradients of a step's updates, whose sums and maxima are policy_loss's metrics.

    Means over tokens are exact over the whole step. A quantity that no update measured is left out.
    """
    measured = [update for update in updates if update.num_loss_tokens > 0]
    scalars: dict[str, float] = {
        "policy/updates": len(updates),
        "policy/skipped_updates": sum(update.skipped for update in updates),
    }
    if updates:
        scalars["policy/lr"] = updates[-1].lr
    if not measured:
        return scalars

    sums = {key: sum(update.sums[key] for update in measured) for key in measured[0].sums}
    maxima = {key: float(np.max([update.maxima[key] for update in measured])) for key in measured[0].maxima}
    num_tokens = sum(update.num_loss_tokens for update in measured)
    scalars |= {
        tag: sums[key] / num_tokens
        for tag, key in {
            "policy/entropy": "entropy",
            "policy/kl": "approx_kl",
            "policy/reference_kl": "reference_kl",
            "ratio/mean": "ratio",
            "ratio/left_of_clip": "left_of_clip",
            "ratio/right_of_clip": "right_of_clip",
            "ratio/left_of_clip_acting": "tokens_left",
            "ratio/right_of_clip_acting": "tokens_right",
            "engine/logprob_difference_mean": "abs_rollout_logprob_diff",
            "engine/logprob_difference_bias": "rollout_logprob_diff",
            "engine/importance_weight": "importance_weight",
            "engine/importance_corrected": "importance_corrected",
        }.items()
        if key in sums
    }
    scalars |= {
        "policy/loss": float(np.mean([update.loss for update in measured])),
        "ratio/clamped": sums["clamped_log_ratio"],
        "ratio/max": maxima["ratio"],
        **dynamics_scalars(sums),
        "entropy/covariance": covariance(measured),
    }
    if sums.get("squared_importance_weight"):
        effective = sums["importance_weight"] ** 2 / sums["squared_importance_weight"]
        scalars["engine/importance_effective_sample_size"] = effective / num_tokens
    if "abs_rollout_logprob_diff" in maxima:
        scalars["engine/logprob_difference_max"] = maxima["abs_rollout_logprob_diff"]
    if updates[0] is measured[0]:
        scalars["ratio/first_update_max_deviation"] = updates[0].maxima["abs_ratio_minus_one"]
    grad_norms = [update.grad_norm for update in measured if not update.skipped]
    if grad_norms:
        scalars["policy/grad_norm"] = float(np.mean(grad_norms))
        scalars["policy/grad_norm_max"] = max(grad_norms)
    return scalars


def dynamics_scalars(sums: Mapping[str, float]) -> dict[str, float]:
    """Shares of tokens and of gradient weight, from algorithm/dynamics.py's sums. A share of nothing is left out."""
    clipped = sums["tokens_left"] + sums["tokens_right"]
    num_tokens = sums["num_tokens"]
    shares: dict[str, tuple[float, float]] = {
        **{f"quadrant/{name}_tokens": (sums[f"tokens_{name}"], num_tokens) for name in QUADRANTS},
        **{f"quadrant/{name}_gradient": (sums[f"gradient_{name}"], sums["gradient"]) for name in QUADRANTS},
        "ratio/left_of_clip_gradient": (sums["gradient_left"], sums["gradient"]),
        "ratio/right_of_clip_gradient": (sums["gradient_right"], sums["gradient"]),
        "ratio/effective_sample_size": (sums["ratio"] ** 2, sums["squared_ratio"] * num_tokens),
        "probability/clipped": (sums["probability_left"] + sums["probability_right"], clipped),
        "probability/unclipped": (
            sums["probability"] - sums["probability_left"] - sums["probability_right"],
            num_tokens - clipped,
        ),
    }
    return {tag: part / whole for tag, (part, whole) in shares.items() if whole > 0}


def step_histograms(updates: Sequence[UpdateStats]) -> dict[str, Histogram]:
    """Of the ratio, over all loss tokens of the step's updates; none without a token."""
    measured = [update for update in updates if update.num_loss_tokens > 0]
    if not measured:
        return {}
    return {
        "ratio/histogram": Histogram(
            upper_bounds=np.exp(LOG_RATIO_BOUNDS),
            counts=np.sum([update.ratio_histogram for update in measured], axis=0),
            sum=sum(update.sums["ratio"] for update in measured),
            sum_squares=sum(update.sums["squared_ratio"] for update in measured),
        )
    }


def in_force_scalars(updates: Sequence[InForce]) -> dict[str, float]:
    """The values that a step's updates were made with, which do not change within it. None for a step without updates."""
    if not updates:
        return {}
    loss = updates[-1].loss
    values = {
        "algorithm/beta1": loss.beta1,
        "algorithm/beta2": loss.beta2,
        "algorithm/clip_low": loss.clip_low,
        "algorithm/clip_high": loss.clip_high,
        "algorithm/entropy_coef": loss.entropy_coef,
        "algorithm/entropy_target": updates[-1].entropy_target,
    }
    return {tag: value for tag, value in values.items() if value is not None}


def sample_texts(rollout: Rollout, count: int) -> list[str]:
    """Markdown of at most `count` samples: the first response of groups evenly spaced over the batch."""
    count = min(count, len(rollout.groups))
    groups = [rollout.groups[i * len(rollout.groups) // count] for i in range(count)]
    return [_sample_text(group, group.responses[0], group.verdicts[0]) for group in groups]


def _sample_text(group: Group, response: Response, verdict: Verdict) -> str:
    facts = [
        f"reward {verdict.reward:g}",
        "correct" if verdict.correct else "incorrect",
        f"ground truth {group.prompt.ground_truth}",
        f"{len(response.token_ids)} tokens",
        f"finish reason {response.finish_reason}",
        f"row {group.prompt.row}",
    ]
    if verdict.outcome != "scored":
        facts.insert(1, verdict.outcome)
    return f"**{', '.join(facts)}**\n\nprompt:\n\n{_code(group.prompt.text)}\n\nresponse:\n\n{_code(response.text)}"


def _code(text: str) -> str:
    """An indented block: no text can end it, as a fence could be ended."""
    return textwrap.indent(text or " ", "    ", lambda line: True)
