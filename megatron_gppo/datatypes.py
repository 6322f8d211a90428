"""Every structure that travels through a training step, in the order in which a step creates them.

A step turns each type into the next; no stage fills in a field that an earlier one left empty:

    Prompt -> Group (Response, Verdict) -> Sample -> UpdateBatch (MicroBatch) -> ScoredBatch -> UpdateStats

Letters: G responses of one prompt, L tokens of one response, P tokens of its prompt, S sequences in a
micro-batch, T packed tokens of a micro-batch (prompts, responses and alignment padding).

Worked example. Prompt "2+3=" is the ids [5, 14, 6, 13] (P = 4), a response is "5<eos>" = [8, 1] (L = 2).
Packed alone with an alignment of 8 it becomes (T = 8, "." is padding, "x" is ignored):

    input_ids     5 14  6 13  8  1  .  .
    position_ids  0  1  2  3  4  5  6  7
    targets       x  x  x  8  1  x  x  x      the token that follows
    loss_mask     0  0  0  1  1  0  0  0      true where a response token is predicted (EOS included)
    cu_seqlens    [0, 8]                      padding is the end of its sequence: causal attention hides it
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

FinishReason = Literal["stop", "length"]
Outcome = Literal["scored", "unparsable", "timeout", "crash"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered with the chat template."""

    row: int  # row in the data set, over all its files: identifies the prompt
    token_ids: list[int] = field(repr=False)  # [P]
    text: str = field(repr=False)  # what token_ids spell
    ground_truth: str
    data_source: str


@dataclass(frozen=True, slots=True)
class Response:
    """What an engine generated for one prompt, exactly as it reported it.

    repr() leaves out what is long: asyncio.run() takes that of what its coroutine returned, a whole rollout, and drops it.
    """

    token_ids: list[int] = field(repr=False)  # [L]; ends with EOS when finish_reason is "stop"
    logprobs: list[float] = field(repr=False)  # [L]; of the temperature-scaled distribution, in nats
    text: str = field(repr=False)
    finish_reason: FinishReason
    policy_versions: list[int] = field(repr=False)  # [L]; version of the weights that generated the token; never falls

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the reward said of one response."""

    reward: float
    correct: bool
    outcome: (
        Outcome  # anything but "scored" received the reward of a wrong answer (or a part of it is 0) and is counted
    )
    answer: str | None = None  # what was judged, where the reward function says so
    parts: dict[str, float] = field(default_factory=dict)  # by name, of a reward that is a sum of several


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its G responses and their rewards."""

    prompt: Prompt
    responses: list[Response]  # [G]
    verdicts: list[Verdict]  # [G]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's groups, and what it took to get them."""

    groups: list[Group]  # [prompts_per_step]
    counts: dict[str, int]  # events by name, e.g. {"dropped_groups": 3, "retried_requests": 1}
    seconds: dict[str, float]  # {"generate": ..., "reward": ...}; the two overlap
    data_position: int = 0  # prompts that this step and all before it have taken; 0 where there is no stream of prompts


@dataclass(frozen=True, slots=True)
class Sample:
    """One response with its advantage: what the policy trains on."""

    group: int  # index of its group in the step; samples of one group share it
    prompt_ids: np.ndarray  # [P] int64
    response_ids: np.ndarray  # [L] int64
    rollout_logprobs: np.ndarray  # [L] float32
    advantage: float  # the same for all L tokens
    correct: bool
    masked: bool  # true: takes part in nothing, neither in the loss nor in its denominator


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples packed into one row for one forward pass. Tensors are on the CPU until the policy moves them, and whole
    until it cuts them over context-parallel ranks."""

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    targets: torch.Tensor  # [T] int64, input_ids moved one to the left in each sequence; 0 where loss_mask is false
    loss_mask: torch.Tensor  # [T] bool, true where targets is a response token that counts
    advantages: torch.Tensor  # [T] float32, 0 where loss_mask is false
    rollout_logprobs: torch.Tensor  # [T] float32, 0 where loss_mask is false
    cu_seqlens: torch.Tensor  # [S+1] int32, from 0 to T
    sequence_lengths: torch.Tensor  # [S] int64, loss tokens of each sequence
    group_lengths: torch.Tensor  # [S] int64, loss tokens of each sequence's group in this update
    correct: torch.Tensor  # [S] bool
    sample_indices: list[int]  # indices into the step's samples; empty for a filler that only keeps ranks in step


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """One optimizer step's micro-batches of this data-parallel rank, and its global counts."""

    microbatches: list[MicroBatch]  # equally many on every rank
    num_loss_tokens: int  # these four count over all micro-batches of all data-parallel ranks
    num_loss_sequences: int  # sequences with at least one loss token
    num_loss_groups: int  # groups with at least one loss token
    num_correct_tokens: int  # loss tokens of correct samples


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """An update batch with the log-probs of the policy before the step's first update, and of the reference policy."""

    update: UpdateBatch
    old_logprobs: list[torch.Tensor]  # one [T] float32 a micro-batch, 0 where loss_mask is false
    ref_logprobs: list[torch.Tensor] | None = None  # likewise; None in a run without a reference policy


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one optimizer step did. Equal on every rank."""

    sums: dict[str, float]  # policy_loss's metrics, summed over all micro-batches and ranks
    maxima: dict[str, float]  # likewise, by maximum
    ratio_histogram: list[float]  # likewise, policy_loss's counts of tokens by ratio
    num_loss_tokens: int
    loss: float
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # the gradient was not finite, or no token counted: no weight moved


class EntropyPoint(NamedTuple):
    """A step in entropy_trace.py."""

    covariance: float  # Eq. 7's, over the step's loss tokens
    entropy: float  # nats, mean over the same tokens
