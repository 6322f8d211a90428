"""The engines that a configuration asks for, started: rank 0's pool of all, and what other nodes do for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from megatron_gppo.config import Config
from megatron_gppo.rollout.hosts import EngineHost, ExternalHost, LocalHost
from megatron_gppo.rollout.nodes import EngineStore, NodeEngines, RemoteHost, own_address
from megatron_gppo.rollout.placement import EnginePlace, Node, engine_places
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.rollout.router import Router


@contextmanager
def launched_engines(config: Config, *, needs_weights: bool = True) -> Iterator[EnginePool]:
    """Launches all engines, for the time of the context, without waiting for them: see EnginePool. For rank 0.

    Those of other nodes are launched there, by launched_node_engines. Raises ConfigError.
    """
    rollout = config.rollout
    here = Node.here()
    places = engine_places(rollout, here)
    several_nodes = any(place.node != here.index for place in places)
    address = own_address(rollout.host) if several_nodes else None
    store = cache(lambda: EngineStore(rollout.start_timeout_s))
    hosts: list[EngineHost] = [
        LocalHost(config, place, _log(config, place, places), address)
        if place.node == here.index
        else RemoteHost(rollout, place, store)
        for place in places
    ]
    hosts += [ExternalHost(rollout, url) for url in rollout.urls]

    def start_router() -> Router:
        return Router(rollout, config.run.dir / "router.log")

    pool = EnginePool(
        rollout, hosts, needs_weights=needs_weights, start_router=start_router if rollout.router else None
    )
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def launched_node_engines(config: Config) -> Iterator[None]:
    """Launches this node's engines, for the time of the context, and does what rank 0 orders. For the first rank of a node
    that is not rank 0's."""
    here = Node.here()
    places = engine_places(config.rollout, here)
    own = [(place, _log(config, place, places)) for place in places if place.node == here.index]
    engines = NodeEngines(config, own)
    try:
        yield
    finally:
        engines.close()


def _log(config: Config, place: EnginePlace, places: list[EnginePlace]) -> Path:
    return config.run.dir / ("engine.log" if len(places) == 1 else f"engine_{place.index}.log")
