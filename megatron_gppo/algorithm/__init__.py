"""The algorithm in pure torch: advantages, log-probs and entropy, losses. Knows neither Megatron nor SGLang."""

from megatron_gppo.algorithm.advantages import group_advantages, is_degenerate, samples_from_groups
from megatron_gppo.algorithm.aggregation import loss_denominator
from megatron_gppo.algorithm.dynamics import LOG_RATIO_BOUNDS, QUADRANTS
from megatron_gppo.algorithm.entropy_control import EntropyControl, after_step
from megatron_gppo.algorithm.in_force import InForce, values_in_force
from megatron_gppo.algorithm.logprobs import linear_logprobs_and_entropy, vocab_parallel_logprobs_and_entropy
from megatron_gppo.algorithm.losses import LossOutput, policy_loss
from megatron_gppo.config import LossConfig

__all__ = [
    "LOG_RATIO_BOUNDS",
    "QUADRANTS",
    "EntropyControl",
    "InForce",
    "LossConfig",
    "LossOutput",
    "after_step",
    "group_advantages",
    "is_degenerate",
    "linear_logprobs_and_entropy",
    "loss_denominator",
    "policy_loss",
    "samples_from_groups",
    "values_in_force",
    "vocab_parallel_logprobs_and_entropy",
]
