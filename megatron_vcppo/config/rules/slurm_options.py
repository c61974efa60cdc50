"""What the section ``cluster`` puts into batch scripts and requests of Slurm."""

import re
from collections.abc import Iterator

from megatron_vcppo.config.schema import Config

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
OF_A_JOB = {
    "nodes": "set cluster.trainer_nodes and cluster.rollout_nodes",
    "time": "set cluster.time_limit_minutes",
    "cpus-per-task": "set cluster.cpus_per_node",
    "gpus-per-node": "set cluster.gpus_per_node",
    "signal": "set cluster.save_margin_s",
} | dict.fromkeys(
    (
        "array", "chdir", "clusters", "dependency", "error", "help", "input", "job-name", "kill-on-invalid-dep",
        "no-kill", "no-requeue", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket",
        "open-mode", "output", "parsable", "quiet", "requeue", "test-only", "usage", "version", "wait", "wrap",
    ),
    "remove it",
)  # fmt: skip
"""Options of sbatch that the chain sets itself, or that would change what it reads from sbatch and in its logs: the
key to set instead."""


def batch_script(config: Config) -> Iterator[str]:
    """No value becomes another line, option or pattern of the batch script. cluster.setup alone holds shell lines."""
    cluster = config.cluster
    values = {f"cluster.{name}": value for name, value in vars(cluster).items() if isinstance(value, str)}
    values |= {f"cluster.sbatch.{name}": value for name, value in cluster.sbatch.items()}
    for key, value in values.items():
        if found := CONTROL.search(value):
            yield f"{key} {value!r} holds the control character {found[0]!r}: remove it"
    for name in cluster.sbatch:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield f"cluster.sbatch {name!r} is not the long name of an option, such as reservation"
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"cluster.environment {name!r} is not the name of a variable"


def owned_options(config: Config) -> Iterator[str]:
    """No additional option replaces one on which the chain relies; Slurm also takes the first letters of a name."""
    for name in config.cluster.sbatch:
        if owned := next((option for option in OF_A_JOB if option.startswith(name)), None):
            yield f"cluster.sbatch.{name}: --{owned} is for the chain alone to set or leave out: {OF_A_JOB[owned]}"


def memory(config: Config) -> Iterator[str]:
    """A job requests memory per node or per CPU or GPU."""
    per_node = config.cluster.memory_per_node_gb
    for name in config.cluster.sbatch if per_node else ():
        if name.replace("_", "-") in ("mem", "mem-per-cpu", "mem-per-gpu"):
            yield (
                f"cluster.sbatch.{name} and cluster.memory_per_node_gb {per_node:g} both request memory: set "
                "cluster.memory_per_node_gb=null, or remove the option"
            )


SLURM_RULES = (batch_script, owned_options, memory)
