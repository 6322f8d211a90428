"""Two hosts on one machine, with a link that can be cut without a word, as a switch that fails would.

As network namespaces where they can be made (as root, or in a user namespace); otherwise as two loopback addresses,
whose rendezvous and HTTP go through proxies that stop to forward.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

STORE_PORT = 29511
ENGINE_PORTS = (31001, 31002)
FIRST, SECOND = 0, 1


class TwoHosts(Protocol):
    addresses: tuple[str, str]

    def command(self, host: int, command: list[str]) -> list[str]:
        """What runs it on that host."""

    def store(self, host: int) -> tuple[str, int]:
        """Where that host finds the rendezvous store, which is on the first."""

    def engine(self, port: int) -> str:
        """URL of the server that the second host has there, for the first."""

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""

    def mend(self) -> None: ...


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    with contextlib.ExitStack() as stack:
        hosts: TwoHosts
        try:
            hosts = _namespaces(stack)
        except (OSError, subprocess.CalledProcessError, TimeoutError) as error:
            print(f"two hosts as proxies, for namespaces cannot be made: {error!r}")
            hosts = _proxies(stack)
        yield hosts


@dataclass
class _Namespaces:
    holders: tuple[int, int]  # processes that keep them
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def command(self, host: int, command: list[str]) -> list[str]:
        return [*_enter(self.holders[host]), *command]

    def store(self, host: int) -> tuple[str, int]:
        return self.addresses[FIRST], STORE_PORT

    def engine(self, port: int) -> str:
        return f"http://{self.addresses[SECOND]}:{port}"

    def cut(self) -> None:
        """Each takes another machine for the other."""
        for host, peer in ((FIRST, SECOND), (SECOND, FIRST)):
            self._ip(host, "neigh", "replace", self.addresses[peer], "lladdr", "02:00:00:00:00:01", "dev", f"v{host}")

    def mend(self) -> None:
        for host, peer in ((FIRST, SECOND), (SECOND, FIRST)):
            self._ip(host, "neigh", "del", self.addresses[peer], "dev", f"v{host}")

    def connect(self) -> None:
        self._ip(FIRST, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(self.holders[SECOND]))
        for host in (FIRST, SECOND):
            self._ip(host, "addr", "add", f"{self.addresses[host]}/24", "dev", f"v{host}")
            self._ip(host, "link", "set", f"v{host}", "up")
            self._ip(host, "link", "set", "lo", "up")

    def _ip(self, host: int, *arguments: str) -> None:
        subprocess.run(self.command(host, ["ip", *arguments]), check=True, capture_output=True)


def _namespaces(stack: contextlib.ExitStack) -> _Namespaces:
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    first = _hold(["unshare", *own_user, "--net"], stack)
    second = _hold([*_enter(first), "unshare", "--net"], stack)
    hosts = _Namespaces((first, second))
    hosts.connect()
    return hosts


def _hold(unshare: list[str], stack: contextlib.ExitStack) -> int:
    """A process that does nothing but be in a new namespace."""
    process = subprocess.Popen([*unshare, "sleep", "infinity"], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/comm").read_text().strip() != "sleep":
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError("no namespace")
        time.sleep(0.01)
    return process.pid


def _enter(pid: int) -> list[str]:
    own_user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", "--target", str(pid), "--net", *own_user]


@dataclass
class _Proxy:
    """Forwards connections to an address, while it is open. A port of its own."""

    target: tuple[str, int]
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.4", 0)))
    open: threading.Event = field(default_factory=threading.Event)
    connections: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.getsockname()[:2]

    def reset(self) -> None:
        """Ends the connections that a cut left behind."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()
        self.open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.open.wait()
        try:
            server = socket.create_connection(self.target)
        except OSError:
            client.close()
            return
        self.connections += [client, server]
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.open.wait()
                sink.sendall(data)
        self.open.wait()  # nor is an end told
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class _Proxies:
    to_store: _Proxy
    to_engines: dict[int, _Proxy]
    addresses: tuple[str, str] = ("127.0.0.2", "127.0.0.3")

    def command(self, host: int, command: list[str]) -> list[str]:
        return command

    def store(self, host: int) -> tuple[str, int]:
        return (self.addresses[FIRST], STORE_PORT) if host == FIRST else self.to_store.address

    def engine(self, port: int) -> str:
        host, proxied = self.to_engines[port].address
        return f"http://{host}:{proxied}"

    def cut(self) -> None:
        for proxy in (self.to_store, *self.to_engines.values()):
            proxy.open.clear()

    def mend(self) -> None:
        for proxy in (self.to_store, *self.to_engines.values()):
            proxy.reset()


def _proxies(stack: contextlib.ExitStack) -> _Proxies:
    hosts = _Proxies(
        _Proxy((_Proxies.addresses[FIRST], STORE_PORT)),
        {port: _Proxy((_Proxies.addresses[SECOND], port)) for port in ENGINE_PORTS},
    )
    for proxy in (hosts.to_store, *hosts.to_engines.values()):
        stack.callback(proxy.listener.close)
    return hosts
