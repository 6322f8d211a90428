"""What the ranks tell each other beside their collectives, which cannot be used once one of them is stuck.

Over the rendezvous store, through a connection of its own: that every rank is alive, that rank 0 moves on, that a rank was
told to stop, and who had to end the run, and why. A thread does it every second and may block on a host that cannot be
reached; everyone else only reads what it has seen last.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist

from megatron_gppo.job import Job

ROUND_S = 1.0


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the run ends, as the rank says that saw it first."""

    kind: Literal["stall", "failure"]
    rank: int
    text: str


class Peers:
    """One rank's view of the others. start() begins, close() ends it; say() tells all ranks why the run ends."""

    def __init__(self, job: Job) -> None:
        connection = job.store.clone()  # type: ignore[attr-defined]  # not in the stubs
        self._store: dist.Store = dist.PrefixStore("peers", connection)
        self._rank = job.rank
        self._world_size = job.world_size
        self._address = job.address
        self._beats = 0
        self._moves = 0
        self._heard: dict[int, tuple[bytes, float]] = {}  # rank 0: the last beat of each, and when it came
        self._hosts: dict[int, str] = {}
        self._asks_to_stop = False
        self._to_say: Ending | None = None
        self._name_missing = False
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        # What others read.
        self.last_contact = time.monotonic()  # with the store
        self.broken: str | None = None  # the store is gone for good
        self.ending: Ending | None = None
        self.num_reports = 0  # ranks that have seen the ending
        self.missing: list[str] | None = None  # the others, once asked for
        self.rank_0_moves = 0  # rises whenever rank 0 gets on
        # What they may set, on rank 0: what is done, in a thread, once a rank has asked to stop.
        self.on_stop: Callable[[], None] | None = None

    def start(self) -> None:
        self._thread.start()

    def moved(self) -> None:
        """Rank 0 has got on."""
        self._moves += 1

    def ask_to_stop(self) -> None:
        """Has rank 0 do its on_stop, soon."""
        self._asks_to_stop = True
        self._wake.set()

    def say(self, ending: Ending) -> None:
        """Tells all ranks, unless another was first; ending holds the first one soon."""
        self._to_say = ending
        self._wake.set()

    def find_missing(self) -> None:
        """Makes `missing` hold the ranks that have not seen the ending, soon."""
        self._name_missing = True
        self._wake.set()

    def silent(self, longer_than_s: float) -> list[str]:
        """Ranks that have not been heard of for so long, as rank 0 sees it."""
        now = time.monotonic()
        return [self._name(peer) for peer, (_, at) in list(self._heard.items()) if now - at > longer_than_s]

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        try:
            self._store.set(f"host/{self._rank}", f"{socket.gethostname()}, {self._address}")
            while not self._closed:
                self._round()
                self.last_contact = time.monotonic()
                self._wake.wait(ROUND_S)
                self._wake.clear()
        except RuntimeError as error:  # torch.distributed's errors all are: the connection does not come back
            self.broken = str(error).splitlines()[0]

    def _round(self) -> None:
        store = self._store
        self._beats += 1
        store.set(f"beat/{self._rank}", str(self._beats))
        if self._rank == 0:
            store.set("moves", str(self._moves))
            self._hear()
        elif store.check(["moves"]):
            self.rank_0_moves = int(store.get("moves"))
        if self._asks_to_stop:
            store.set("stop", "")
        if self.on_stop is not None and store.check(["stop"]):
            self.on_stop()
            self.on_stop = None
        if self._to_say is not None and self.ending is None:
            store.compare_set("ending", "", json.dumps(asdict(self._to_say)))
        if self.ending is None and store.check(["ending"]):
            store.set(f"report/{self._rank}", "")
            store.add("reports", 1)
            self.ending = Ending(**json.loads(store.get("ending")))
        if self.ending is not None:
            self.num_reports = store.add("reports", 0)
            if self._name_missing:
                absent = [peer for peer in range(self._world_size) if not store.check([f"report/{peer}"])]
                self._hosts |= {peer: _get(store, f"host/{peer}") for peer in absent if store.check([f"host/{peer}"])}
                self.missing = [self._name(peer) for peer in absent]

    def _hear(self) -> None:
        """Rank 0 alone, or a large job would have every rank read every other one's."""
        peers = range(self._world_size)
        keys = [f"beat/{peer}" for peer in peers]
        if not self._hosts:
            if not self._store.check(keys):  # not all have joined; until then the time limit of joining holds
                return
            hosts = self._store.multi_get([f"host/{peer}" for peer in peers])
            self._hosts = {peer: host.decode() for peer, host in zip(peers, hosts, strict=True)}
        now = time.monotonic()
        for peer, beat in zip(peers, self._store.multi_get(keys), strict=True):
            if peer not in self._heard or beat != self._heard[peer][0]:
                self._heard[peer] = (beat, now)

    def _name(self, peer: int) -> str:
        return f"rank {peer} ({self._hosts.get(peer, 'never joined')})"


def _get(store: dist.Store, key: str) -> str:
    return store.get(key).decode()
