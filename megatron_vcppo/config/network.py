"""This node's address and interface on the network of a run; the only reader of cluster.network_interface. No torch."""

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.errors import UserError

ROUTES = Path("/proc/net/route")
LOOPBACK = "lo"


@dataclass(frozen=True)
class NodeNetwork:
    """How other nodes reach this one: everything listens on ``address``; gloo and NCCL use ``interface``."""

    address: str
    """IPv4."""
    interface: str


def node_network(cluster: ClusterConfig, environment: Mapping[str, str] = os.environ) -> NodeNetwork:
    """This node's address and interface in the run's network.

    cluster.network_interface if it is set. Default: the loopback interface where everything is on one node;
    else the node's name in Slurm, if that is an IPv4 address; else the interface of the default route.
    Raises UserError with the node's name and its interfaces if there is no such interface.
    """
    addresses = interface_addresses()
    wanted = cluster.network_interface
    name = environment.get("SLURMD_NODENAME", "")
    if wanted is None and (cluster.name == "local" or num_nodes(cluster) == 1):
        wanted = LOOPBACK
    elif wanted is None:
        wanted = name if is_address(name) else default_route_interface()
    if wanted in addresses:
        return NodeNetwork(addresses[wanted], wanted)
    if wanted is not None and is_address(wanted):
        for interface, address in addresses.items():
            if address == wanted or (is_loopback(address) and is_loopback(wanted)):
                return NodeNetwork(wanted, interface)
    lacks = f"no IPv4 interface or address {wanted}" if wanted else "no default route"
    there = ", ".join(f"{interface} {address}" for interface, address in addresses.items()) or "none"
    raise UserError(f"{name or socket.gethostname()}: {lacks}; available: {there}; set cluster.network_interface")


def num_nodes(cluster: ClusterConfig) -> int:
    """Nodes of the largest job."""
    return cluster.trainer_nodes + cluster.rollout_nodes


def interface_addresses() -> dict[str, str]:
    """The first IPv4 address of every interface of this node that has one."""
    import psutil

    found: dict[str, str] = {}
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET:
                found.setdefault(interface, address.address)
    return found


def default_route_interface() -> str | None:
    """The interface of the default route with the lowest metric; None if there is none."""
    routes = [line.split() for line in ROUTES.read_text().splitlines()[1:]] if ROUTES.exists() else []
    defaults = [(int(route[6]), route[0]) for route in routes if route[1] == route[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def is_address(text: str) -> bool:
    """True for an IPv4 address."""
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def is_loopback(interface: str) -> bool:
    """True for the loopback interface and its addresses, which no other node can reach."""
    return interface == LOOPBACK or (is_address(interface) and ipaddress.IPv4Address(interface).is_loopback)


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening TCP socket on this address alone. OSError with the address and the port if that is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(error.errno, f"address already in use: {address}:{port}") from None
        raise OSError(error.errno, f"cannot listen on {address}:{port}: {error.strerror}") from None
    return listener
