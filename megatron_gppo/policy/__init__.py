"""The trained policy on Megatron-Core. Nothing outside this package imports megatron."""

import warnings

# At import and in every step Megatron warns of missing TransformerEngine and Apex, and of calls that torch deprecates;
# a user can do nothing about either here. Before the imports below, or the first ones would come through.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")

from megatron_gppo.policy.checkpoint import CheckpointError, Progress  # noqa: E402
from megatron_gppo.policy.meta_build import BuildError, parameters_built  # noqa: E402
from megatron_gppo.policy.policy import Policy  # noqa: E402
from megatron_gppo.policy.setup import initialize_distributed, initialize_model_parallel, shut_down  # noqa: E402

__all__ = [
    "BuildError",
    "CheckpointError",
    "Policy",
    "Progress",
    "initialize_distributed",
    "initialize_model_parallel",
    "parameters_built",
    "shut_down",
]
