"""NaN and infinity in weights: converted as they are, and reported."""

import logging
from pathlib import Path

from torch import Tensor

from megatron_gppo.convert.memory import is_finite
from megatron_gppo.convert.table import Parameter

logger = logging.getLogger(__name__)


def warn_of_non_finite(source: Path, parameter: Parameter, full: Tensor) -> None:
    """Logs a warning for each HF tensor of the parameter that holds any."""
    if is_finite(full):
        return
    for name, tensor in parameter.to_hf(full):
        if not is_finite(tensor):
            logger.warning("%s: %s holds NaN or infinity", source, name)
