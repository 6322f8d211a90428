import errno
import socket
import struct

import pytest

from megatron_gppo.rollout.ports import number_of, reserve_port

IP_LOCAL_PORT_RANGE = 51  # Linux 6.3: which ports the kernel may choose for this socket
HOST = "127.0.0.1"


def with_only_choice(number: int) -> socket.socket:
    """A socket whose "any port" can only be this one."""
    chooser = socket.socket()
    chooser.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        chooser.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", number | number << 16))
    except OSError as error:
        chooser.close()
        if error.errno == errno.ENOPROTOOPT:
            pytest.skip("this kernel cannot be told which port to choose")
        raise
    return chooser


def test_a_reserved_port_is_given_to_nobody_who_wants_any() -> None:
    with reserve_port(HOST) as reserved:
        number = number_of(reserved)
        with with_only_choice(number) as listener, pytest.raises(OSError, match="in use"):
            listener.bind((HOST, 0))
        with (
            socket.create_server((HOST, 0)) as server,
            with_only_choice(number) as client,
            pytest.raises(OSError, match="Cannot assign"),
        ):
            client.connect(server.getsockname())
    with with_only_choice(number) as listener:
        listener.bind((HOST, 0))
        assert number_of(listener) == number


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
def test_a_server_listens_on_the_port_reserved_for_it(host: str) -> None:
    with (
        reserve_port(host) as reserved,
        socket.create_server((host, number_of(reserved))) as server,
        socket.create_connection((HOST, number_of(reserved))),
    ):
        server.accept()[0].close()


def test_a_port_on_which_somebody_listens_cannot_be_reserved() -> None:
    with socket.create_server((HOST, 0)) as server, pytest.raises(OSError, match="in use"):
        reserve_port(HOST, number_of(server))
