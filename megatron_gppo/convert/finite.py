"""NaN and infinity in weights: converted as they are, and reported."""

import logging
from pathlib import Path

from torch import Tensor

from megatron_gppo.convert.memory import is_finite
from megatron_gppo.convert.table import Parameter

logger = logging.getLogger(__name__)


def warn_of_non_finite(source: Path, parameter: Parameter, full: Tensor, converted: Tensor) -> None:
    """Logs a warning for each HF tensor of the parameter that holds any, or gets any where `full` becomes `converted`."""
    if is_finite(converted):  # then `full` is, too
        return
    parts = zip(parameter.to_hf(full), parameter.to_hf(converted), strict=True)
    for (name, before), (_, after) in parts:
        if not is_finite(before):
            logger.warning("%s: %s holds NaN or infinity", source, name)
        if bool((before.isfinite() & ~after.isfinite()).any()):
            dtype = str(after.dtype).removeprefix("torch.")
            logger.warning("%s: %s has values too large for %s, which become infinity", source, name, dtype)
