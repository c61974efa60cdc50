"""The network of the one-machine Slurm, as root: a namespace per virtual node, joined by a switch, the host on it too.

Every node has an interface ``eth0`` with its own address and a default route, so a listener on 127.0.0.1 of one
node is not reachable from another, as on a real cluster. The switch is a bridge in a separate namespace, which a
``sleep`` holds: all namespaces are anonymous and vanish with their last process, and with them the host's interface.
"""

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

from megatron_vcppo.config.network import interface_addresses
from megatron_vcppo.errors import UserError

CLONE_NEWNET = 0x40000000
NETWORKS = "198.18.{}"
"""Of the range that RFC 2544 sets aside for tests: no real network has these addresses."""
PROBE = "ip link add name left type veth peer name right && ip link add name switch type bridge"
HOLD = ("sleep", "infinity")
READY = 'until grep -q "^eth0.00000000" /proc/net/route; do sleep 0.02; done; exec "$@"'
"""A node's first process: it waits until the interface is in its namespace and configured."""


def possible() -> bool:
    """True for root of a system that has network namespaces, veth, bridges and the command ip."""
    if os.getuid() != 0:
        return False
    try:
        return subprocess.run(["unshare", "--net", "sh", "-c", PROBE], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def free_network(root: Path) -> str:
    """The first three numbers of a /24 network that this machine does not use; another one for every cluster."""
    used = {address.rpartition(".")[0] for address in interface_addresses().values()}
    first = hashlib.sha256(str(root).encode()).digest()[0]
    return next(network for n in range(256) if (network := NETWORKS.format((first + n) % 256)) not in used)


def enter_namespace() -> None:
    """Give this process (between fork and exec) its own network, without interfaces."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


def host_interface(network: str) -> str:
    """The name of the host's interface on a cluster's network."""
    return f"vcppo{network.rpartition('.')[2]}"


def build_switch(network: str, pid: int) -> None:
    """A bridge in the namespace of process ``pid``, and the host on it with the address NETWORK.1."""
    host = host_interface(network)
    ip("link", "add", "name", host, "type", "veth", "peer", "name", "host", "netns", str(pid))
    inside(
        pid, "link add name switch type bridge", "link set host master switch", "link set host up", "link set switch up"
    )
    ip("address", "add", f"{network}.1/24", "dev", host)
    ip("link", "set", host, "up")


def plug_in(network: str, number: int, switch: int, pid: int) -> None:
    """Connect the namespace of process ``pid`` to the switch's, as NETWORK.number; in place of one that was there."""
    port = f"node{number}"
    inside(switch, f"link delete {port}", check=False)
    inside(switch, f"link add name {port} type veth peer name eth0 netns {pid}")
    inside(switch, f"link set {port} master switch", f"link set {port} up")
    address = f"address add {network}.{number}/24 dev eth0"
    # The host forwards nothing: without these routes every look-up of a name waits for an answer until it times out.
    refused = [f"route add unreachable {server}/32" for server in name_servers(Path("/etc/resolv.conf"))]
    inside(pid, "link set lo up", address, "link set eth0 up", *refused, f"route add default via {network}.1")


def name_servers(resolver: Path) -> list[str]:
    """The IPv4 addresses of a resolver's configuration that are not this machine's own; [] without the file."""
    lines = resolver.read_text().splitlines() if resolver.is_file() else []
    words = [line.split() for line in lines]
    servers = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
    return sorted({server for server in servers if "." in server and not server.startswith("127.")})


def inside(pid: int, *commands: str, check: bool = True) -> None:
    """Run commands of ip in the network namespace of a process."""
    run(["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"], "\n".join(commands), check)


def ip(*arguments: str) -> None:
    """Run ip here."""
    run(["ip", *arguments], "", True)


def run(argv: list[str], text: str, check: bool) -> None:
    """UserError with what the command says if it fails."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise UserError(f"{' '.join(argv)} {text}: {done.stderr.strip()}")
