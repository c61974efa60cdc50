"""What a stage's roles are: their commands, their number, their environment; the same here and on a cluster."""

import socket
import sys
from dataclasses import dataclass

from megatron_vcppo.config import Config
from megatron_vcppo.config.checks import trainer_ranks
from megatron_vcppo.stages.stored_set import needs_engines
from slurm.run_folder import RunFolder

ROLLOUT_STAGES = ("reward_model", "value_pretrain", "ppo", "evaluate")
"""Stages that generate."""


@dataclass(frozen=True)
class Programs:
    """The Python modules behind the roles, and the interpreter."""

    trainer: str = "megatron_vcppo.stages"
    rollout: str = "megatron_vcppo.rollout.serve"
    python: str = sys.executable

    def trainer_command(self, run: RunFolder, stage: str) -> tuple[str, ...]:
        """What every rank runs."""
        return (self.python, "-m", self.trainer, stage, "--config", str(run.config))

    def rollout_command(self, run: RunFolder, stage: str, node: int) -> tuple[str, ...]:
        """What starts and supervises the engines of one rollout node."""
        where = ("--rendezvous", str(run.rendezvous(stage)), "--node", str(node))
        return (self.python, "-m", self.rollout, "--config", str(run.config), *where)


PROGRAMS = Programs()


def trainer_layout(config: Config, stage: str) -> tuple[int, int]:
    """(nodes, ranks on each of them) of a stage's trainer. An export is one process's work: it moves files."""
    if stage == "export":
        return 1, 1
    nodes = config.cluster.trainer_nodes
    return nodes, trainer_ranks(config) // nodes


def starts_engines(config: Config, stage: str) -> bool:
    """Whether a stage gets rollout units now: not if it generates nothing, or its set of rollouts is there already."""
    return stage in ROLLOUT_STAGES and needs_engines(config, stage)


def free_port(address: str = "") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def role_environment(config: Config) -> dict[str, str]:
    """Variables that every role gets, on this machine and on a cluster."""
    cluster = config.cluster
    # Removed: compiled modules halve a rank's and an engine's start, and the variable that forbids them is common in
    # container images, where it only saves space.
    env = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
    ranks_per_node = trainer_ranks(config) // cluster.trainer_nodes
    env["OMP_NUM_THREADS"] = str(max(1, cluster.cpus_per_node // ranks_per_node) if cluster.gpus_per_node else 1)
    if cluster.network_interface:
        env |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), cluster.network_interface)
    return env | dict(cluster.environment)
