"""Settings of the nodes in the section ``cluster``: their network, caches, containers, variables and time limits."""

import re
from collections.abc import Iterator

from megatron_vcppo.config.network import is_address, is_loopback, num_nodes
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.sections.cluster import LOCAL

INTERFACE = re.compile(r"[^\s/,^=]{1,15}")
"""Interface names that Linux allows, without the characters of NCCL's and gloo's lists and patterns."""
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def network(config: Config) -> Iterator[str]:
    """cluster.network_interface names one interface, which all nodes of a job can use."""
    cluster, name = config.cluster, config.cluster.network_interface
    if name is None:
        return
    digits = re.fullmatch(r"[\d.]*", name) and not is_address(name)
    if digits or name.count(":") > 1 or not INTERFACE.fullmatch(name):
        yield (
            f"cluster.network_interface {name!r} is neither an interface such as ib0 nor an IPv4 address: set one name "
            "(no list or pattern), or null for the interface of the default route"
        )
        return
    if cluster.name == LOCAL or num_nodes(cluster) == 1:
        return
    nodes = f"{cluster.trainer_nodes} trainer + {cluster.rollout_nodes} rollout nodes"
    advice = "set the interface that they share, such as ib0, or null for the interface of the default route"
    if is_loopback(name):
        yield f"cluster.network_interface {name} is a loopback: {nodes} cannot reach each other over it; {advice}"
    elif is_address(name):
        yield f"cluster.network_interface {name} is the address of one node, the job has {nodes}; {advice}"


def node_cache(config: Config) -> Iterator[str]:
    """cluster.node_cache is an absolute path."""
    folder = config.cluster.node_cache
    if folder is not None and (not folder.startswith("/") or "$" in folder):
        yield (
            f"cluster.node_cache {folder!r} must be an absolute path without variables, on a node-local disk, or "
            "null for vcppo-cache-UID below $TMPDIR or /tmp"
        )


def container(config: Config) -> Iterator[str]:
    """Keys of a container need its image."""
    cluster = config.cluster
    if cluster.container_image:
        return
    for key in ("container_python", "container_mounts"):
        if value := getattr(cluster, key):
            yield f"cluster.{key} {value} needs cluster.container_image: set that, or cluster.{key} to null"


def python_path(config: Config) -> Iterator[str]:
    """The nodes import the submitted code."""
    path = config.cluster.environment.get("PYTHONPATH")
    if path is not None and config.cluster.name != LOCAL:
        yield (
            "cluster.environment.PYTHONPATH would override the submitted code (RUN/code): put "
            f"'export PYTHONPATH={path}' into cluster.setup, where the code still comes first"
        )


def secrets(config: Config) -> Iterator[str]:
    """No secrets in a stored configuration."""
    for name in config.cluster.environment:
        if any(word in name.upper() for word in SECRET_WORDS):
            yield (
                f"cluster.environment.{name} looks like a secret, and configurations are stored where others can read "
                f"them: export {name} in the shell that submits"
            )


def time_limits(config: Config) -> Iterator[str]:
    """cluster.stage_time_limit_minutes is about stages of the chain."""
    unknown = set(config.cluster.stage_time_limit_minutes) - set(config.stages)
    if unknown and config.cluster.name != LOCAL:
        yield (
            f"cluster.stage_time_limit_minutes names no stage of this chain: {', '.join(sorted(unknown))}; the chain "
            f"is {', '.join(config.stages)}"
        )


def run_folder(config: Config) -> Iterator[str]:
    """Slurm replaces %j, %x and others in the names of log files."""
    if config.cluster.name != LOCAL and "%" in config.run.dir:
        yield f"run.dir {config.run.dir}: Slurm replaces % in the names of log files: choose a folder without it"


def memory(config: Config) -> Iterator[str]:
    """A job requests memory per node or per CPU or GPU."""
    per_node = config.cluster.memory_per_node_gb
    for name in config.cluster.sbatch if per_node else ():
        if name.replace("_", "-") in ("mem", "mem-per-cpu", "mem-per-gpu"):
            yield (
                f"cluster.sbatch.{name} and cluster.memory_per_node_gb {per_node:g} both request memory: set "
                "cluster.memory_per_node_gb=null, or remove the option"
            )


NODE_RULES = (network, node_cache, container, python_path, secrets, time_limits, run_folder, memory)
