"""The ranks and groups of this process, as one value that is passed to whoever needs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class PeerFailed(RuntimeError):  # noqa: N818 - what happened, as ConnectionRefused would be
    """Another rank failed, and reports why. The message repeats it."""


def is_of_communication(error: Exception) -> bool:
    """Whether a collective failed, or the store, rather than this rank's own code. gloo has no class for its errors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True, slots=True)
class ParallelState:
    """Where this rank stands. A group of size 1 may be None."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    control_group: dist.ProcessGroup | None  # gloo, all ranks: Python objects and small CPU tensors
    cp_rank: int = 0
    cp_size: int = 1
    cp_group: dist.ProcessGroup | None = None
    # A pipeline stage's ranks share out the experts: ep_size neighbours have one copy of them, the next neighbours another.
    ep_rank: int = 0
    ep_size: int = 1
    expert_dp_rank: int = 0  # number of the copy
    ep_group: dist.ProcessGroup | None = None

    @property
    def is_last_pp_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank speaks for those with the same weights, its peers in data and context parallelism."""
        return self.dp_rank == 0 and self.cp_rank == 0

    def from_rank_0(self, action: Callable[[], T]) -> T:
        """Runs it on rank 0 and returns its result on every rank.

        If it raises, rank 0 raises that and the others PeerFailed: nobody waits for a rank that has gone.
        """
        outcome: list[Any] = [None, None]  # result, reason of failure
        cause: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                cause = error
                outcome[1] = f"rank 0: {error}"
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, group=self.control_group, group_src=0)
        if cause is not None:
            raise cause
        if outcome[1] is not None:
            raise PeerFailed(outcome[1])
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control_group)
        return values
