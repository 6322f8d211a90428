"""The trained policy on Megatron-Core. Nothing outside this package imports megatron."""

from megatron_gppo.policy.checkpoint import CheckpointError, Progress
from megatron_gppo.policy.policy import Policy
from megatron_gppo.policy.setup import initialize_distributed, initialize_model_parallel, shut_down

__all__ = [
    "CheckpointError",
    "Policy",
    "Progress",
    "initialize_distributed",
    "initialize_model_parallel",
    "shut_down",
]
