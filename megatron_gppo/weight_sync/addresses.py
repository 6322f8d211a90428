"""Which addresses are this machine's own."""

import ipaddress
import socket
from functools import cache
from urllib.parse import urlsplit

from megatron_gppo.config import ConfigError, SyncConfig


def check_host(sync: SyncConfig) -> None:
    """Raises ConfigError when engines cannot be given weights from sync.host, which is to be an address of this machine.

    Before anything is started: torch would look for the host until sync.timeout_s, and at the first sync.
    """
    if sync.transport == "distributed" and not is_own(sync.host):
        raise ConfigError(
            f"sync.host = {sync.host} is not an address of rank 0's machine. Fix: set it to one that the engines can reach"
        )


@cache
def is_on_this_machine(url: str) -> bool:
    """Whether the server at the URL runs here."""
    return is_own(urlsplit(url).hostname or "")


def is_own(host: str) -> bool:
    """Whether one can listen there. A name is looked up."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as own:
            own.bind(address)
        return True
    except (OSError, UnicodeError):  # the latter: no name can be written so
        return False


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback  # all of 127.*, where hosts files have a host's own name
    except ValueError:
        return host == "localhost"
