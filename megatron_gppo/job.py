"""The job that torchrun started, as this rank sees it: where the ranks meet, who it is, and how others reach its host."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_gppo.config import Config


class JobError(RuntimeError):
    """The ranks did not meet."""


@dataclass(frozen=True, slots=True)
class Job:
    """What torchrun's environment says, and the rendezvous store, which is on the first node."""

    store: dist.Store
    rank: int
    world_size: int
    store_address: str  # host:port
    address: str  # of this host, on the network that leads to the store


def join_job(config: Config) -> Job:
    """Returns when all ranks are there. Raises JobError when they are not within run.collective_timeout_s."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = _address_towards(host, port)
    if int(os.environ["WORLD_SIZE"]) > int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])):
        _use_interface_of(address)
    limit = config.run.collective_timeout_s
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
    except RuntimeError as error:
        raise JobError(
            f"rank {os.environ['RANK']} ({socket.gethostname()}, {address}), phase 'join': the {os.environ['WORLD_SIZE']} ranks have "
            f"not met at {host}:{port} within run.collective_timeout_s = {limit:g} s ({_first_line(error)}). Fix: look for the first "
            "error of another rank; the first node's address and port must be reachable from every node"
        ) from error
    return Job(store, rank, world_size, f"{host}:{port}", address)


def _address_towards(host: str, port: int) -> str:
    """This host's address on the way there; nothing is sent."""
    try:
        family, kind, *_, destination = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(destination)
            return str(probe.getsockname()[0])
    except OSError:
        return "no known address"


def _use_interface_of(address: str) -> None:
    """Makes gloo listen there. By itself it takes the interface of the host's name, and where that leads to loopback, as on
    many installations, no other host can connect. Whoever sets GLOO_SOCKET_IFNAME knows better.
    """
    try:
        if ipaddress.ip_address(address).is_loopback:  # the first node, by a name that its hosts file points there
            return
    except ValueError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if address in (entry.address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
