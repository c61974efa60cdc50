"""What a stage's roles are: their commands, their number, their environment; the same here and on a cluster."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES, engine_placement, trainer_ranks
from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.rollout_store import needs_engines


@dataclass(frozen=True)
class RoleCommands:
    """The Python modules behind the roles, and the interpreter."""

    trainer: str = "megatron_vcppo.stages"
    rollout: str = "megatron_vcppo.rollout.node"
    python: str = sys.executable
    engine: str = ""
    """What an engine without accelerators runs, if that is to be imported ahead."""

    def trainer_command(self, run: RunFolder, stage: str) -> tuple[str, ...]:
        """What every rank runs."""
        return (self.python, "-m", self.trainer, stage, "--config", str(run.config))

    def rollout_command(self, run: RunFolder, stage: str, node: int) -> tuple[str, ...]:
        """What starts and supervises the engines of one rollout node."""
        where = ("--rendezvous", str(run.stage(stage).rendezvous), "--node", str(node), "--stage", stage)
        return (self.python, "-m", self.rollout, "--config", str(run.config), *where)


ROLE_COMMANDS = RoleCommands(engine="megatron_vcppo.rollout.engine_main")

KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""oneDNN and PyTorch keep up to 1024 kernels that they compiled for a shape of a bfloat16 matrix product each. Packed
micro-batches hardly ever repeat a shape, so a rank would grow with every step; the layers of one pass need about 30."""


def trainer_layout(config: Config, stage: str) -> tuple[int, int]:
    """(nodes, ranks on each of them) of a stage's trainer. An export is one process's work: it moves files."""
    if stage == "export":
        return 1, 1
    config = stage_config(config, stage)
    nodes = config.cluster.trainer_nodes
    return nodes, trainer_ranks(config) // nodes


def starts_engines(config: Config, stage: str) -> bool:
    """Whether a stage gets rollout processes: not if it generates nothing, or its set of rollouts is there already."""
    return stage in ENGINE_STAGES and needs_engines(config, stage)


def threads_per_rank(config: Config) -> int:
    """Threads with which a trainer rank computes on the CPU: by default its share of the node's cores, at least 1."""
    cluster = config.cluster
    if cluster.threads_per_rank is not None:
        return cluster.threads_per_rank
    if cluster.name == LOCAL:  # all ranks are on this machine, whatever the number of nodes
        return max(1, len(os.sched_getaffinity(0)) // trainer_ranks(config))
    return max(1, cluster.cpus_per_node * cluster.trainer_nodes // trainer_ranks(config))


def role_environment(config: Config, role: Literal["trainer", "rollout"]) -> dict[str, str]:
    """Variables of a role, on this machine and on a cluster; cluster.environment has the last word."""
    cluster = config.cluster
    # Removed: compiled modules halve a rank's and an engine's start, and the variable that forbids them is common in
    # container images, where it only saves space.
    env = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
    env["OMP_NUM_THREADS"] = str(threads_per_rank(config))
    if role == "trainer" and not cluster.gpus_per_node:
        # PASSIVE: threads that wait spin otherwise, and take the cores of engines and verifiers.
        env |= {"OMP_WAIT_POLICY": "PASSIVE", **KEPT_KERNELS}
    if role == "trainer" and cluster.gpus_per_node:
        # One queue to the GPU: kernels start in the order of their calls, on which Megatron's overlap of communication
        # with computation relies.
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        if engine_placement(config) != "trainer_gpus":  # CUDA IPC of such memory needs rights that many sites deny
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return env | dict(cluster.environment)
