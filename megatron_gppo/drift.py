"""How far the engine's log-probs are from the policy's under the same weights, and which sample is worst."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_gppo.datatypes import Response, Rollout, Sample, ScoredBatch
from megatron_gppo.packing import unpack
from megatron_gppo.parallel import ParallelState


@dataclass(frozen=True, slots=True)
class WorstSample:
    """The sample of a step whose log-probs differ most between engine and policy."""

    index: int  # in the step's samples
    difference: float  # mean |policy - engine| over its tokens, in nats
    policy_logprobs: np.ndarray  # [L] float32


def worst_sample(
    batches: Sequence[ScoredBatch], samples: Sequence[Sample], parallel: ParallelState
) -> WorstSample | None:
    """The worst of all data-parallel ranks, on every rank; None when no sample has a loss token."""
    own: list[WorstSample] = []
    for batch in batches:
        for index, logprobs in unpack(batch.old_logprobs, batch.update.microbatches).items():
            difference = float(np.abs(logprobs - samples[index].rollout_logprobs).mean())
            own.append(WorstSample(index, difference, logprobs))
    found = [worst for worst in parallel.gather(_worst(own)) if worst is not None]
    return _worst(found)


def _worst(samples: Sequence[WorstSample]) -> WorstSample | None:
    """NaN is worse than any number."""
    return max(samples, key=lambda sample: (np.isnan(sample.difference), sample.difference), default=None)


def write_alarm(folder: Path, step: int, worst: WorstSample, rollout: Rollout) -> Path:
    """Keeps the worst sample as JSON, token by token, to be looked into. Returns its file."""
    responses: list[tuple[str, list[int], Response]] = [
        (group.prompt.text, group.prompt.token_ids, response)
        for group in rollout.groups
        for response in group.responses
    ]
    prompt, prompt_ids, response = responses[worst.index]
    record = {
        "step": step,
        "mean_difference": worst.difference,
        "policy_versions": response.policy_versions,
        "prompt": prompt,
        "response": response.text,
        "prompt_ids": prompt_ids,
        "response_ids": response.token_ids,
        "engine_logprobs": response.logprobs,
        "policy_logprobs": worst.policy_logprobs.tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path
