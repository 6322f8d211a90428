"""A server's port, kept for it from the moment it is chosen until the server listens on it."""

import socket


def reserve_port(host: str, port: int = 0) -> socket.socket:
    """A socket bound to a port of `host`, 0 for a free one; as long as it is open, only who asks by number gets the port.

    A server takes 20 seconds to listen on the port that it was given. Were nobody to hold it, the kernel would
    sometimes give it to one of the many sockets that meanwhile want any port. Two sockets with SO_REUSEADDR may be bound
    to one port as long as only one listens (ip(7), socket(7)): servers set it. Raises OSError.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except OSError:
        held.close()
        raise
    return held


def number_of(port: socket.socket) -> int:
    """The port's number."""
    number: int = port.getsockname()[1]
    return number
