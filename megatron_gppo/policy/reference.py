"""The reference policy of the KL term: the weights that a run started from, kept in host memory.

They score through the policy's own modules: its weights and these change places, tensor by tensor, before and after. So the
device holds at most one tensor more, log-probs are computed exactly as the policy's are, in every layout, and the
policy's weights come back bit for bit. That needs weights that nothing else writes while they score, so Megatron may not
gather them from the distributed optimizer's shards in the forward pass (overlap_param_gather, which is off).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A copy of this rank's parameters, made when it is created: as many bytes of host memory as they take."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._parameters = list(parameters)
        self._held = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]

    @contextmanager
    def in_place_of_policy(self) -> Iterator[None]:
        """Until the block ends, the policy's modules have the reference's weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, held in zip(self._parameters, self._held, strict=True):
            present = parameter.clone()
            parameter.copy_(held)
            held.copy_(present)
