"""What goes wrong outside this program: the commands report it in a few lines, without a traceback."""

from megatron_gppo.config import ConfigError
from megatron_gppo.convert import ConvertError
from megatron_gppo.data import DataError
from megatron_gppo.evaluate import EvaluationError
from megatron_gppo.job import JobError
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.generate import RolloutError
from megatron_gppo.rollout.reward_pool import RewardError
from megatron_gppo.weight_sync import WeightSyncError

MISTAKES = (ConfigError, ConvertError, DataError, RewardError)
REPORTED = (*MISTAKES, EngineError, EvaluationError, JobError, RolloutError, WeightSyncError)


def exit_status(error: Exception) -> int:
    """2 for a mistake in the configuration, the model or the data, found before anything ran; 1 for a failure."""
    return 2 if isinstance(error, MISTAKES) else 1
