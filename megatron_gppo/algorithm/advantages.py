"""Group-relative advantages: from judged groups to training samples.

mean_std       (reward - mean) / (std + 1e-6), with the sample standard deviation (ddof 1): arXiv 2509.20712 Eq. 2
mean           reward - mean (Dr. GRPO, arXiv 2503.20783): prompts of mixed rewards do not weigh less than others
leave_one_out  reward - mean of the other responses (RLOO, arXiv 2402.14740): the baseline does not see the response
"""

from collections.abc import Sequence

import numpy as np

from megatron_gppo.config import Advantage
from megatron_gppo.datatypes import Group, Sample

STD_FLOOR = 1e-6


def group_advantages(rewards: Sequence[float], advantage: Advantage = "mean_std") -> list[float]:
    """The advantages of one group's G responses, in order.

    Equal rewards say nothing about which response was better: they give exactly 0, whatever the mean rounds to.
    Raises ValueError when a reward is not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)  # [G]
    if not np.isfinite(values).all():
        raise ValueError(f"rewards = {list(rewards)}: not finite. Fix: let the reward function return a finite number")
    if _all_equal(rewards):
        return [0.0] * len(rewards)
    centered = values - values.mean()
    match advantage:
        case "mean_std":
            return (centered / (values.std(ddof=1) + STD_FLOOR)).tolist()
        case "mean":
            return centered.tolist()
        case "leave_one_out":
            return (centered * (len(values) / (len(values) - 1))).tolist()  # = reward - (sum - reward) / (G - 1)


def is_degenerate(group: Group) -> bool:
    """Whether all rewards of the group are equal, so that none of its tokens has an advantage."""
    return _all_equal([verdict.reward for verdict in group.verdicts])


def samples_from_groups(
    groups: Sequence[Group], *, advantage: Advantage = "mean_std", mask_truncated: bool = False
) -> list[Sample]:
    """One sample a response, in the order of groups and of the responses in them.

    mask_truncated leaves responses that hit the length limit out of the loss and of its denominator; their rewards
    still shape the advantages of their group.

    Raises ValueError, naming the prompt's row, for a group whose responses, verdicts and log-probs do not match one
    another or whose rewards are not finite.
    """
    return [
        sample
        for index, group in enumerate(groups)
        for sample in _group_samples(index, group, advantage, mask_truncated)
    ]


def _group_samples(index: int, group: Group, kind: Advantage, mask_truncated: bool) -> list[Sample]:
    if len(group.responses) != len(group.verdicts):
        raise ValueError(
            f"prompt row {group.prompt.row}: {len(group.responses)} responses but {len(group.verdicts)} verdicts"
        )
    try:
        advantages = group_advantages([verdict.reward for verdict in group.verdicts], kind)
    except ValueError as error:
        raise ValueError(f"prompt row {group.prompt.row}: {error}") from error
    prompt_ids = np.asarray(group.prompt.token_ids, dtype=np.int64)
    samples = []
    for response, verdict, advantage in zip(group.responses, group.verdicts, advantages, strict=True):
        if len(response.token_ids) != len(response.logprobs):
            raise ValueError(
                f"prompt row {group.prompt.row}: a response has {len(response.token_ids)} tokens "
                f"but {len(response.logprobs)} log-probs"
            )
        samples.append(
            Sample(
                group=index,
                prompt_ids=prompt_ids,
                response_ids=np.asarray(response.token_ids, dtype=np.int64),
                rollout_logprobs=np.asarray(response.logprobs, dtype=np.float32),
                advantage=advantage,
                correct=verdict.correct,
                masked=mask_truncated and response.truncated,
            )
        )
    return samples


def _all_equal(rewards: Sequence[float]) -> bool:
    return all(reward == rewards[0] for reward in rewards)
