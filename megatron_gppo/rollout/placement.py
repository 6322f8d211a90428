"""Which managed engines a run has, and where each runs: node, GPUs or cores, port. Decided alike by every node."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megatron_gppo.config import Config, ConfigError, EngineConfig, RolloutConfig, ServerArgs


@dataclass(frozen=True, slots=True)
class Node:
    """This machine among those that torchrun started; without torchrun the only one, where no policy is."""

    index: int
    count: int
    ranks: int  # of the policy, on each node

    @classmethod
    def here(cls) -> "Node":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        count = int(os.environ["WORLD_SIZE"]) // ranks if ranks else 1
        return cls(int(os.environ.get("GROUP_RANK", 0)), count, ranks)


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """One managed engine."""

    index: int  # among all of the run
    node: int
    tp: int
    port: int | None  # None: a free one
    gpus: list[int] = field(default_factory=list)  # none: what the node shows
    cores: list[int] = field(default_factory=list)  # none: the system decides
    server_args: ServerArgs = field(default_factory=dict)

    @property
    def cores_of_ranks(self) -> list[list[int]]:
        """The cores of each tensor-parallel rank."""
        share = len(self.cores) // self.tp
        return [self.cores[rank * share : (rank + 1) * share] for rank in range(self.tp)]


def only_place(rollout: RolloutConfig) -> EnginePlace:
    """The engine of a run that lists none."""
    return EnginePlace(0, 0, rollout.engine_tp, rollout.port, server_args=rollout.server_args)


def engine_places(rollout: RolloutConfig, here: Node) -> list[EnginePlace]:
    """The managed engines of all nodes. Raises ConfigError for a node, or more GPUs, than there are."""
    if rollout.mode != "managed":
        return []
    places: list[EnginePlace] = []
    for number, entry in enumerate(rollout.engines or [EngineConfig()]):
        nodes = range(here.count) if entry.nodes == "all" else entry.nodes
        for node in nodes:
            if node >= here.count:
                raise ConfigError(
                    f"rollout.engines.{number}.nodes = {entry.nodes}: there are {here.count} nodes, counted from 0. Fix: start "
                    "more, or correct it"
                )
            places += _on_node(
                rollout, entry, here, node, len(places), [place for place in places if place.node == node]
            )
    return places


def ranks_that_fit(config: Config, gpus: int) -> int:
    """As many ranks of the policy as the only node has room for beside its engines: whole data-parallel copies, one at least."""
    rollout = config.rollout
    taken = 0
    if rollout.mode == "managed" and rollout.placement == "disaggregated":
        taken = sum(entry.count * (entry.tp or rollout.engine_tp) for entry in rollout.engines or [EngineConfig()])
    copy = config.parallel.tp * config.parallel.pp * config.parallel.cp
    return max(1, (gpus - taken) // copy) * copy


def _on_node(
    rollout: RolloutConfig, entry: EngineConfig, here: Node, node: int, first: int, before: list[EnginePlace]
) -> Iterable[EnginePlace]:
    """An entry's engines on one node; `before` are those of earlier entries there."""
    tp = entry.tp or rollout.engine_tp
    server_args = rollout.server_args | entry.server_args
    gpus = _gpus(rollout, entry, here, tp, before)
    for engine in range(entry.count):
        share = len(entry.cores or []) // entry.count
        yield EnginePlace(
            index=first + engine,
            node=node,
            tp=tp,
            port=None if rollout.port is None else rollout.port + len(before) + engine,
            gpus=gpus[engine * tp : (engine + 1) * tp],
            cores=(entry.cores or [])[engine * share : (engine + 1) * share],
            server_args=server_args,
        )


def _gpus(rollout: RolloutConfig, entry: EngineConfig, here: Node, tp: int, before: list[EnginePlace]) -> list[int]:
    """GPUs of all the entry's engines on one node."""
    if not torch.cuda.is_available():
        return []
    policy = 0 if rollout.placement == "colocated" else here.ranks
    if entry.gpus is not None:
        if taken := [gpu for gpu in entry.gpus if gpu < policy]:
            raise ConfigError(
                f"rollout.engines: gpus = {entry.gpus}, but {taken} are the policy's, which takes the first {policy} of each node. "
                "Fix: give others, start fewer ranks, or set rollout.placement: colocated"
            )
        if absent := [gpu for gpu in entry.gpus if gpu >= torch.cuda.device_count()]:
            raise ConfigError(
                f"rollout.engines: gpus = {entry.gpus}, but there are {torch.cuda.device_count()} on a node, counted from 0, and so "
                f"no {absent}. Fix: give others"
            )
        return entry.gpus
    if "base_gpu_id" in {name.replace("-", "_") for name in (*rollout.server_args, *entry.server_args)}:
        return []  # the user's, in SGLang's own way
    named = {gpu for other in rollout.engines for gpu in other.gpus or []}  # on whichever node
    used = named | {gpu for place in before for gpu in place.gpus}
    free = [gpu for gpu in range(policy, torch.cuda.device_count()) if gpu not in used]
    wanted = entry.count * tp
    if len(free) < wanted:
        raise ConfigError(
            f"{entry.count} engines of tp {tp} need {wanted} GPUs of a node, and the policy's ranks and other engines leave {len(free)}. Fix: start "
            "fewer ranks or engines, or set rollout.placement: colocated"
        )
    return free[:wanted]
