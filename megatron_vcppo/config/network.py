"""A role's node: its address and interface on the network of a run (the only reader of cluster.network_interface), and
the variables and node-local caches that it sets up before it starts. No torch."""

import errno
import ipaddress
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.errors import UserError

ROUTES = Path("/proc/net/route")
LOOPBACK = "lo"
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
    "WANDB_CACHE_DIR": "wandb",
}
"""Variable → folder below cluster.node_cache. In a shared home directory many engines would lock and overwrite each
other's compiled kernels, and load a network file system at every start; and it may be read-only or full."""


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


def node_environment(cluster: ClusterConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of a role on this node, without those already set in ``environment``; makes the cache folder.

    Raises UserError if the node lacks the interface, or the folder cannot be made or belongs to someone else.
    """
    interface = node_network(cluster, environment).interface
    cache = private_folder(Path(cluster.node_cache) if cluster.node_cache else default_cache(environment))
    variables = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
    variables |= {name: str(cache / folder) for name, folder in CACHES.items()}
    return {name: value for name, value in variables.items() if not environment.get(name)}


def default_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """A folder of this user on the node-local disk: below $TMPDIR, or below /tmp."""
    return Path(environment.get("TMPDIR") or tempfile.gettempdir()) / f"vcppo-cache-{os.getuid()}"


def private_folder(path: Path) -> Path:
    """Make the folder, readable only by its user. UserError if that is not possible, or if another user made it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"cluster.node_cache: {path} cannot be made: {error.strerror}; set another folder") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"cluster.node_cache: {path} belongs to another user; set another folder")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path
