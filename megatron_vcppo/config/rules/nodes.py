"""Settings of the nodes in the section ``cluster``: their network, caches, containers, variables and time limits."""

import re
from collections.abc import Iterator

from megatron_vcppo.config.network import is_address, is_loopback, num_nodes
from megatron_vcppo.config.rules.slurm_options import CONTROL
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.sections.cluster import LOCAL

INTERFACE = re.compile(r"[^\s/,^=]{1,15}")
"""Interface names that Linux allows, without the characters of NCCL's and gloo's lists and patterns."""
NO_PATH_IN_A_JOB = {"%": "Slurm replaces it in the names of logs", ":": "it separates the folders of PYTHONPATH"}
NO_PATH_IN_A_JOB["\\"] = "Slurm reads it as the end of a pattern"


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


def run_folder(config: Config) -> Iterator[str]:
    """run.dir, as it is written, names a folder."""
    path = config.run.dir
    if not path.strip():
        yield f"run.dir {path!r} is empty: name a folder, such as runs/first"
    elif re.match(r"~[^/]", path):
        yield f"run.dir {path!r}: write the path of that home in full; only ~/ is replaced"
    else:
        yield from run_path_problems(path, config.cluster.name)


def run_path_problems(path: str, cluster: str) -> Iterator[str]:
    """A path of a run that Slurm, the shell and Python do not read alike; cluster: cluster.name.

    ``checked_stages`` (commands/arguments.py) applies it to the absolute path, whose upper folders no configuration
    names.
    """
    if found := CONTROL.search(path):
        yield f"run.dir {path!r} holds the control character {found[0]!r}: choose another name"
    if cluster != LOCAL:
        for character, why in NO_PATH_IN_A_JOB.items():
            if character in path:
                yield f"run.dir {path!r} must not hold {character!r} on a cluster ({why}): choose another name"


def time_limits(config: Config) -> Iterator[str]:
    """cluster.stage_time_limit_minutes is about stages of the chain."""
    unknown = set(config.cluster.stage_time_limit_minutes) - set(config.stages)
    if unknown and config.cluster.name != LOCAL:
        yield (
            f"cluster.stage_time_limit_minutes names no stage of this chain: {', '.join(sorted(unknown))}; the chain "
            f"is {', '.join(config.stages)}"
        )


NODE_RULES = (network, node_cache, container, python_path, run_folder, time_limits)
