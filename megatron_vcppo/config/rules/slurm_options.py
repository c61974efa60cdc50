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
OF_A_STEP = {
    "container-image": "set cluster.container_image",
    "container-mounts": "set cluster.container_mounts",
    "gpus-per-node": "set cluster.gpus_per_node",
    "gres": "set cluster.sbatch.gres",
} | dict.fromkeys(
    (
        "accel-bind", "chdir", "clusters", "cpus-per-gpu", "cpus-per-task", "dependency", "distribution", "error",
        "exclude", "exclusive", "export", "gpu-bind", "gpus", "gpus-per-socket", "gpus-per-task", "help", "het-group",
        "input", "job-name", "jobid", "kill-on-bad-exit", "label", "multi-prog", "no-allocate", "nodefile", "nodelist",
        "nodes", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "open-mode",
        "output", "overlap", "preserve-env", "pty", "relative", "test-only", "tres-bind", "tres-per-task", "usage",
        "version", "wait",
    ),
    "remove it",
)  # fmt: skip
"""The same of srun: options that would change which tasks, GPUs, variables and logs a step has."""
OWNED = {"sbatch": OF_A_JOB, "srun": OF_A_STEP}
"""Key of the section cluster with additional options → options that it may not name."""


def batch_script(config: Config) -> Iterator[str]:
    """No value becomes another line, option or pattern of the batch script. cluster.setup alone holds shell lines."""
    cluster = config.cluster
    values = {f"cluster.{name}": value for name, value in vars(cluster).items() if isinstance(value, str)}
    values |= {f"cluster.{key}.{name}": value for key in OWNED for name, value in getattr(cluster, key).items()}
    for key, value in values.items():
        if found := CONTROL.search(value):
            yield f"{key} {value!r} holds the control character {found[0]!r}: remove it"
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"cluster.environment {name!r} is not the name of a variable"


def additional_options(config: Config) -> Iterator[str]:
    """They have long names, and none replaces one on which the chain relies; Slurm also takes the first letters."""
    for key, owned in OWNED.items():
        for name in getattr(config.cluster, key):
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                yield f"cluster.{key} {name!r} is not the long name of an option, such as reservation"
            elif option := next((option for option in owned if option.startswith(name)), None):
                yield f"cluster.{key}.{name}: --{option} is for the chain alone to set or leave out: {owned[option]}"


def memory(config: Config) -> Iterator[str]:
    """A job requests memory per node or per CPU or GPU."""
    per_node = config.cluster.memory_per_node_gb
    for name in config.cluster.sbatch if per_node else ():
        if name.replace("_", "-") in ("mem", "mem-per-cpu", "mem-per-gpu"):
            yield (
                f"cluster.sbatch.{name} and cluster.memory_per_node_gb {per_node:g} both request memory: set "
                "cluster.memory_per_node_gb=null, or remove the option"
            )


SLURM_RULES = (batch_script, additional_options, memory)
