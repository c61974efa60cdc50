"""Keys of the section ``cluster`` that cannot work as they are written, found without looking at a node."""

import re
from collections.abc import Iterator

from megatron_vcppo.config.network import is_address, is_loopback, num_nodes
from megatron_vcppo.config.placement import engine_placement, uses_engines
from megatron_vcppo.config.schema import Config

INTERFACE = re.compile(r"[^\s/,^=]{1,15}")
"""What Linux takes for an interface's name, without what NCCL and gloo read as lists and patterns."""


def check_cluster(config: Config) -> Iterator[str]:
    """One line per problem."""
    yield from _check_network(config)
    yield from _check_node_cache(config.cluster.node_cache)
    yield from _check_container(config)
    yield from _check_offload(config)
    yield from _check_python_path(config)


def _check_network(config: Config) -> Iterator[str]:
    cluster, name = config.cluster, config.cluster.network_interface
    if name is None:
        return
    digits = re.fullmatch(r"[\d.]*", name) and not is_address(name)
    if digits or name.count(":") > 1 or not INTERFACE.fullmatch(name):
        yield (
            f"cluster.network_interface {name!r} is neither an interface such as ib0 nor an IPv4 address: name one (no "
            "list or pattern), or set null for that of the default route"
        )
        return
    if cluster.name == "local" or num_nodes(cluster) == 1:
        return
    nodes = f"{cluster.trainer_nodes} trainer + {cluster.rollout_nodes} rollout nodes"
    advice = "name the interface that they share, such as ib0, or set null for that of the default route"
    if is_loopback(name):
        yield f"cluster.network_interface {name} is a loopback: {nodes} cannot reach each other over it; {advice}"
    elif is_address(name):
        yield f"cluster.network_interface {name} is the address of one node, the job has {nodes}; {advice}"


def _check_node_cache(folder: str | None) -> Iterator[str]:
    if folder is not None and (not folder.startswith("/") or "$" in folder):
        yield (
            f"cluster.node_cache {folder!r} must be an absolute path without variables, on the node's own disk, or "
            "null for vcppo-cache-UID below $TMPDIR or /tmp"
        )


def _check_container(config: Config) -> Iterator[str]:
    cluster = config.cluster
    if cluster.container_image:
        return
    for key in ("container_python", "container_mounts"):
        if value := getattr(cluster, key):
            yield f"cluster.{key} {value} needs cluster.container_image: set that, or cluster.{key} to null"


def _check_offload(config: Config) -> Iterator[str]:
    placement = engine_placement(config)
    if config.weight_sync.offload_weights and uses_engines(config) and placement != "trainer_gpus":
        yield (
            "weight_sync.offload_weights needs cluster.engines_on trainer_gpus, where engines use the trainer's GPUs; "
            f"got {placement}: set it to false"
        )


def _check_python_path(config: Config) -> Iterator[str]:
    path = config.cluster.environment.get("PYTHONPATH")
    if path is not None and config.cluster.name != "local":
        yield (
            "cluster.environment.PYTHONPATH would take the place of the submitted code (RUN/code): put "
            f"'export PYTHONPATH={path}' into cluster.setup: the code then comes before it"
        )
