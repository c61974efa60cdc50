"""Where a node is reached, which listeners others can reach, and what a role sets up on its node."""

import os
import socket
import stat
from pathlib import Path

import pytest

from megatron_vcppo.config import ClusterConfig, network
from megatron_vcppo.config.network import (
    CACHES,
    NodeNetwork,
    default_route_interface,
    listen,
    node_environment,
    node_network,
    private_folder,
)
from megatron_vcppo.errors import UserError

NODE = {"lo": "127.0.0.1", "eth0": "10.1.0.7", "ib0": "10.2.0.7"}
ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth1 00000000 010200C0 0003 0 0 200 00000000 0 0 0
eth0 00000000 010200C0 0003 0 0 100 00000000 0 0 0
ib0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0
"""


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node with three interfaces and the routes in the file that is returned."""
    routes = tmp_path / "routes"
    routes.write_text(ROUTES)
    monkeypatch.setattr(network, "interface_addresses", lambda: dict(NODE))
    monkeypatch.setattr(network, "ROUTES", routes)
    return routes


def cluster(nodes: int = 2, **keys: str | None) -> ClusterConfig:
    return ClusterConfig(name="big", trainer_nodes=nodes, rollout_nodes=0, **keys)  # type: ignore[arg-type]


def test_the_default_is_the_default_route_between_nodes_and_loopback_on_one() -> None:
    assert node_network(cluster(), {"SLURMD_NODENAME": "gpu7"}) == NodeNetwork("10.1.0.7", "eth0")
    for one in (ClusterConfig(trainer_nodes=4), cluster(nodes=1)):
        assert node_network(one, {"SLURMD_NODENAME": "gpu7"}) == NodeNetwork("127.0.0.1", "lo")


def test_a_node_named_by_its_address_is_reached_there() -> None:
    assert node_network(cluster(), {"SLURMD_NODENAME": "10.2.0.7"}) == NodeNetwork("10.2.0.7", "ib0")
    assert node_network(cluster(), {"SLURMD_NODENAME": "127.0.0.11"}) == NodeNetwork("127.0.0.11", "lo")


def test_the_key_is_a_name_or_an_address() -> None:
    assert node_network(cluster(network_interface="ib0"), {}) == NodeNetwork("10.2.0.7", "ib0")
    assert node_network(cluster(nodes=1, network_interface="10.1.0.7"), {}) == NodeNetwork("10.1.0.7", "eth0")


def test_what_a_node_lacks_is_one_line_with_what_it_has(node: Path) -> None:
    there = "available: lo 127.0.0.1, eth0 10.1.0.7, ib0 10.2.0.7; set cluster.network_interface"
    for wanted in ("ib7", "10.9.9.9"):
        with pytest.raises(UserError) as error:
            node_network(cluster(network_interface=wanted), {"SLURMD_NODENAME": "gpu7"})
        assert str(error.value) == f"gpu7: no IPv4 interface or address {wanted}; {there}"
    node.write_text(ROUTES.splitlines()[0])
    with pytest.raises(UserError) as error:
        node_network(cluster(), {"SLURMD_NODENAME": "gpu7"})
    assert str(error.value) == f"gpu7: no default route; {there}"


def test_the_default_route_of_the_least_metric_counts(node: Path) -> None:
    assert default_route_interface() == "eth0"
    node.unlink()
    assert default_route_interface() is None


def test_a_listener_is_on_its_address_alone_and_a_taken_port_is_named() -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5)
        with pytest.raises(OSError, match=f"address already in use: 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_a_role_sets_what_its_user_did_not(tmp_path: Path) -> None:
    keys = cluster(network_interface="ib0", node_cache=str(tmp_path / "cache"))
    given = {"NCCL_SOCKET_IFNAME": "eth0", "TRITON_CACHE_DIR": "/mine"}
    made = node_environment(keys, given)
    assert made["GLOO_SOCKET_IFNAME"] == "ib0" and not set(given) & set(made)
    assert {made[name] for name in CACHES if name in made} <= {
        str(tmp_path / "cache" / kind) for kind in CACHES.values()
    }
    assert set(made) | set(given) == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", *CACHES}


def test_the_cache_is_the_users_own(tmp_path: Path) -> None:
    made = node_environment(cluster(), {"TMPDIR": str(tmp_path)})
    folder = tmp_path / f"vcppo-cache-{os.getuid()}"
    assert made["VLLM_CACHE_ROOT"] == str(folder / "vllm") and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(private_folder(folder).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="link belongs to another user; set another folder"):
        private_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cluster\.node_cache: .*/file/x cannot be made: Not a directory"):
        private_folder(tmp_path / "file" / "x")
