"""What the probes of `vcppo doctor` found on the nodes, judged: a line if it is good, UserError if it is not. Pure."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_vcppo.config import ClusterConfig
from megatron_vcppo.errors import UserError

Found = Sequence[dict[str, Any]]
"""What a probe's tasks found, one each."""

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → the oldest driver branch that runs programs of all its minor versions."""
LEAST_SHARE = 0.3
"""Of the links' rate: a healthy all-reduce reaches over half of it, one over the wrong network some per cent."""


def answers(lines: Sequence[str], tasks: int) -> list[str]:
    """The marked lines of a probe; UserError if not every task has printed one."""
    if len(lines) < tasks:
        raise UserError(
            f"{len(lines)} of {tasks} tasks of the test job printed what they found: do a prolog, a module system or a "
            "wrapper of srun take their output?"
        )
    return sorted(lines)


def records(lines: Sequence[str], tasks: int) -> Found:
    """The same where each is a JSON object."""
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    answers(lines[: len(found)], tasks)
    return found


def transformer_engine(found: Found) -> str:
    """It imports on every node, its compiled part included."""
    for node in found:
        if not node["transformer_engine"]:
            raise UserError(f"{node['node']}: {node['transformer_engine_error']}: install it with tools/setup.sh gpu")
    return f"{_one(found, 'transformer_engine')} on {len(found)} nodes"


def compiler(found: Found) -> str:
    """Megatron and Triton compile on the nodes when they first need a kernel."""
    for node in found:
        if not node["compiler"]:
            raise UserError(f"{node['node']}: no C++ compiler: install g++ there, or name one in CXX")
        if not node["python_header"]:
            raise UserError(
                f"{node['node']}: no Python.h: install the Python headers there (python3-dev, python3-devel)"
            )
    return f"{_one(found, 'compiler')}, Python.h"


def driver(found: Found) -> str:
    """Every node's driver runs torch's CUDA."""
    for node in found:
        if not node["cuda"]:
            raise UserError(f"{node['node']}: torch there is built without CUDA: install with tools/setup.sh gpu")
        if not node["driver"]:
            raise UserError(f"{node['node']}: no NVIDIA driver answers: is it a GPU node? see cluster.partition")
        least = LEAST_DRIVER.get(int(node["cuda"].split(".")[0]), 0)
        if int(node["driver"].split(".")[0]) < least:
            raise UserError(
                f"{node['node']}: driver {node['driver']}; torch's CUDA {node['cuda']} needs {least} or newer: a newer "
                "driver there, or a torch built for an older CUDA"
            )
    return f"{_one(found, 'driver')}, CUDA {_one(found, 'cuda')}"


def collective(found: Found, cluster: ClusterConfig) -> str:
    """Every node shows its GPUs, and the all-reduce is not far below what the links carry (on GPUs)."""
    short = [task for task in found if task["gpus"] < cluster.gpus_per_node]
    if short:
        raise UserError(
            f"{short[0]['node']}: torch sees {short[0]['gpus']} GPUs, cluster.gpus_per_node is "
            f"{cluster.gpus_per_node}: is this torch built for the driver there?"
        )
    slowest = min(found, key=lambda task: float(task["bus_gb_per_s"]))
    nodes, rate = len({task["node"] for task in found}), float(slowest["bus_gb_per_s"])
    ranks = f"{len(found)} GPUs of {nodes} nodes" if cluster.gpus_per_node else f"{nodes} nodes"
    text = f"{slowest['backend']} over {ranks} on {slowest['interface']}: {rate:g} GB/s of bus bandwidth"
    links, name = cluster.link_gb_per_s, "cluster.link_gb_per_s"
    if links is None:
        links, name = slowest["link_gb_per_s"], slowest["links"]
    if cluster.gpus_per_node and links and len(found) > 1:
        text += f", the links carry {links:g} ({name})"
        if rate < LEAST_SHARE * links:
            raise UserError(
                f"{text}: under {LEAST_SHARE:.0%}; NCCL_DEBUG=INFO in cluster.environment shows which network NCCL "
                "takes; see cluster.network_interface, NCCL_IB_HCA"
            )
    return f"{text}, first in {max(task['first_s'] for task in found)} s"


def engines(found: Found) -> str:
    """How long the slowest engine took to start."""
    slowest = max(found, key=lambda task: float(task["seconds"]))
    return f"one of a tiny model answers after {slowest['seconds']} s on {slowest['node']}, the slowest of {len(found)}"


def _one(found: Found, key: str) -> str:
    return ", ".join(sorted({str(node[key]) for node in found}))
