"""Engines on other nodes: each node's first rank starts that node's engines, and does what rank 0 orders through a store.

The store is the one that torchrun's ranks meet at, MASTER_ADDR:MASTER_PORT. For each engine it has two keys: rank 0
writes how often the engine shall have been started (`order`), the node writes what became of that (`state`: the start's
number, and the URL once it is healthy or the reason why it ended). All decisions are rank 0's (pool.py).
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_gppo.config import Config, ConfigError, RolloutConfig
from megatron_gppo.rollout.engine import EngineError, EngineFaultError
from megatron_gppo.rollout.hosts import EngineHost, LocalHost
from megatron_gppo.rollout.placement import EnginePlace

POLL_S = 0.5
SILENCE_S = 60.0  # longer than a node itself may take, before it is taken for lost


def own_address(host: str) -> str:
    """The address of this node by which others reach it: that from which it reaches the first node. Raises ConfigError."""
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    first, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((first, port))  # of a datagram socket: sends nothing
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise ConfigError(
            f"rollout.host = {host}, MASTER_ADDR = {first}: {error.strerror}. Fix: set rollout.host to 0.0.0.0 if the first "
            'node has an IPv4 address, to "::" if it has an IPv6 address'
        ) from error


class EngineStore:
    """The two keys of every engine. Raises EngineError when the store cannot be reached, or is gone with its process."""

    def __init__(self, timeout_s: float) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"no rendezvous store at MASTER_ADDR:MASTER_PORT = {address}:{port}: {error}") from error
        # A store outlives the ranks that torchrun restarts.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"megatron_gppo/engines/{restart}", store)

    def put(self, engine: int, key: str, value: Any) -> None:
        self._do(lambda: self._store.set(f"{engine}/{key}", json.dumps(value)))

    def get(self, engine: int, key: str) -> Any:
        """None if it was not put."""
        name = f"{engine}/{key}"
        return self._do(lambda: json.loads(self._store.get(name)) if self._store.check([name]) else None)

    def _do(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise EngineError(f"the rendezvous store at MASTER_ADDR is gone: {error}") from error


class RemoteHost:
    """A managed engine on another node. See EngineHost."""

    managed = True

    def __init__(self, rollout: RolloutConfig, place: EnginePlace, store: Callable[[], EngineStore]) -> None:
        self._timeout_s = rollout.start_timeout_s
        self._place = place
        self._open_store = store  # later: without torchrun the store is made by the ranks
        self._number = -1
        self._closed = False

    @property
    def gpus(self) -> list[int]:
        return self._place.gpus

    def start(self) -> None:
        self._number += 1
        if self._number > 0:  # the first is the node's own
            self._open_store().put(self._place.index, "order", self._number)

    def wait_ready(self) -> str:
        # The node itself gives up after start_timeout_s, and says more; this is for a node that says nothing.
        deadline = time.monotonic() + self._timeout_s + SILENCE_S
        while not self._closed:
            if (state := self._state()) is not None:
                if state["failure"] is not None:
                    raise EngineFaultError(state["failure"])
                url: str = state["url"]
                return url
            if time.monotonic() > deadline:
                raise EngineFaultError(
                    f"node {self._place.node} said nothing of its engine {self._place.index} within rollout.start_timeout_s = "
                    f"{self._timeout_s:g} s. Fix: look at that node's output"
                )
            time.sleep(POLL_S)
        raise EngineFaultError("the run is ending")

    def check(self) -> None:
        state = self._state()
        if state is not None and state["failure"] is not None:
            raise EngineFaultError(state["failure"])

    def close(self) -> None:
        self._closed = True  # its node ends it

    def _state(self) -> Any:
        """What the node says of the latest start."""
        state = self._open_store().get(self._place.index, "state")
        return state if state is not None and state["number"] == self._number else None


class NodeEngines:
    """The engines of a node that is not rank 0's, with their logs. A thread an engine does the rest."""

    def __init__(self, config: Config, places: Sequence[tuple[EnginePlace, Path]]) -> None:
        self._closing = threading.Event()
        self._timeout_s = config.rollout.start_timeout_s
        self._hosts: list[EngineHost] = []
        self._threads: list[threading.Thread] = []
        for place, log_path in places:
            host = LocalHost(config, place, log_path, own_address(config.rollout.host))
            self._hosts.append(host)
            thread = threading.Thread(
                target=self._serve, args=(place.index, host), name=f"engine {place.index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Ends the engines."""
        self._closing.set()
        for host in self._hosts:
            host.close()
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _serve(self, index: int, host: EngineHost) -> None:
        with suppress(EngineError):  # the store is gone, and with it rank 0: this rank hears of that elsewhere
            store = EngineStore(self._timeout_s)
            number = 0
            while not self._closing.is_set():
                failure_told = not self._start(store, index, host, number)
                while not self._closing.wait(POLL_S) and (store.get(index, "order") or 0) == number:
                    if not failure_told:
                        failure_told = self._tell_failure(store, index, host, number)
                number = store.get(index, "order") or 0

    def _start(self, store: EngineStore, index: int, host: EngineHost, number: int) -> bool:
        state: dict[str, Any] = {"number": number, "url": None, "failure": None}
        try:
            host.start()
            state["url"] = host.wait_ready()
        except Exception as error:  # a ConfigError about a port, for example: rank 0 reports it
            state["failure"] = str(error)
        store.put(index, "state", state)
        return state["failure"] is None

    def _tell_failure(self, store: EngineStore, index: int, host: EngineHost, number: int) -> bool:
        try:
            host.check()
        except EngineFaultError as error:
            store.put(index, "state", {"number": number, "url": None, "failure": str(error)})
            return True
        return False
