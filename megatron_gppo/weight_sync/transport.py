"""How buckets get into engines: the interface that a push works with.

    distributed   a torch.distributed group of rank 0 and the engines: NCCL, or gloo on the CPU
    tensor        memory that both see: CUDA IPC on the GPUs that they share, shared memory on the CPU
    disk          a folder of safetensors that the engines read

`pass_bucket` is collective over all ranks; the rest runs on rank 0 only.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.endpoint import EngineProcess, WeightEndpoint
from megatron_gppo.weight_sync.fleet import Fleet

Processes = Mapping[WeightEndpoint, EngineProcess]


class SendAgainError(Exception):
    """An engine was lost, and the others' connections with it: those that are left need the whole sync again."""


class Transport(Protocol):
    """Engines that fail leave the fleet. Every method may raise WeightSyncError when none is left, or for what is wrong on
    this side, and SendAgainError. After either, the engines' weights are unknown until the next whole push.
    """

    in_session: bool  # whether SGLang wants begin_weight_update and end_weight_update around it

    def prepare(self, fleet: Fleet, processes: Processes, device: torch.device) -> None:
        """Connects with the engines, if they are not the ones of the push before. Buckets will be on `device`."""

    def pass_bucket(self, bucket: Bucket | None, size: int, urls: Sequence[str], device: torch.device) -> None:
        """Takes the next bucket of the export, which only rank 0 has, to the ranks that the engines get it from.

        `size` is that of the bucket in bytes, `device` this rank's, `urls` those of the engines when the push began.
        """

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        """Starts to send a bucket, after wait() for the one before. With a version, which the last bucket of a push has,
        the engines take it as that of their weights.
        """

    def wait(self, fleet: Fleet, phases: Phases) -> None:
        """Returns when the last bucket is in the engines, and its memory is free. `phases` gets the seconds of "send" and
        "load", so far as they can be told apart.
        """

    def close(self) -> None:
        """Leaves the engines. Never raises."""
