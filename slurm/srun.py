"""The roles of a stage as srun steps inside one allocation: pure functions from the layout to command lines."""

import shlex
from dataclasses import replace
from pathlib import Path

from megatron_vcppo.config import Config
from slurm.controller import GUARD_ARGUMENTS, Unit
from slurm.guard import ALONE
from slurm.roles import ROLLOUT_STAGES, Programs, role_environment, starts_engines, trainer_layout
from slurm.run_folder import RunFolder

TASK_LAYOUT = ("NTASKS", "NPROCS", "NTASKS_PER_NODE", "TASKS_PER_NODE", "CPUS_PER_TASK")
"""Variables of the batch job that would change a step's own layout; they are removed for the step."""
RANK_SHELL = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
"""Slurm's words for a rank's place, in ours."""


def stage_nodes(config: Config, stage: str) -> int:
    """Nodes of a stage's allocation: rollout nodes are asked for only where something may be generated."""
    nodes, _ = trainer_layout(config, stage)
    return nodes + (config.cluster.rollout_nodes if stage in ROLLOUT_STAGES else 0)


def in_container(config: Config, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command inside the profile's apptainer image; pyxis needs no wrapping, it is an srun option."""
    cluster = config.cluster
    if not cluster.container_image or cluster.container_runtime == "pyxis":
        return command
    gpu = ("--nv",) if cluster.gpus_per_node else ()
    mounts = ("--bind", cluster.container_mounts) if cluster.container_mounts else ()
    return ("apptainer", "exec", *gpu, *mounts, cluster.container_image, *command)


def inside(config: Config, programs: Programs) -> Programs:
    """The programs as the roles call them: an image has an interpreter of its own."""
    cluster = config.cluster
    if not cluster.container_image or not cluster.container_python:
        return programs
    return replace(programs, python=cluster.container_python)


def step(config: Config, nodes: list[str], tasks_per_node: int, cpus_per_task: int) -> tuple[str, ...]:
    """srun with its own task layout on some of the job's nodes; steps share the nodes' CPUs and GPUs.

    srun does not kill a step whose task ended badly, the controller does: a rank that saved and left with 75 must not
    take those along that are still writing.
    """
    cluster = config.cluster
    argv = [
        *(
            "srun",
            "--overlap",
            "--kill-on-bad-exit=0",
            "--wait=0",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
        ),
        *(f"--ntasks={tasks_per_node * len(nodes)}", f"--ntasks-per-node={tasks_per_node}"),
        *(f"--cpus-per-task={cpus_per_task}", "--open-mode=append", "--input=none"),
    ]
    if cluster.gpus_per_node:
        argv.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if cluster.container_image and cluster.container_runtime == "pyxis":
        argv.append(f"--container-image={cluster.container_image}")
        if cluster.container_mounts:
            argv.append(f"--container-mounts={cluster.container_mounts}")
    return tuple(argv)


def srun_units(
    run: RunFolder, config: Config, stage: str, programs: Programs, hosts: list[str], port: int, logs: Path
) -> list[Unit]:
    """One step for all trainer ranks on the first nodes; one per rollout node, so that it can be restarted alone."""
    cluster, programs = config.cluster, inside(config, programs)
    env = role_environment(config) | {f"SLURM_{name}": "" for name in TASK_LAYOUT}
    nodes, ranks_per_node = trainer_layout(config, stage)
    trainers = hosts[:nodes]
    cpus = max(1, cluster.cpus_per_node // ranks_per_node)
    command = (
        *step(config, trainers, ranks_per_node, cpus),
        *("--job-name=trainer", f"--output={logs}/trainer_%t.log"),
        *in_container(
            config, ("sh", "-c", RANK_SHELL, "rank", *guarded(programs, programs.trainer_command(run, stage)))
        ),
    )
    place = {"MASTER_ADDR": trainers[0], "MASTER_PORT": str(port)}
    units = [Unit("trainer", 0, command, env | place, "srun_trainer.log", shown_log="trainer_0.log", step=True)]
    if starts_engines(config, stage):
        for node, host in enumerate(hosts[cluster.trainer_nodes :] or trainers):
            command = (
                *step(config, [host], 1, cluster.cpus_per_node),
                *("--job-name=rollout", f"--output={logs}/rollout_{node}.log"),
                *in_container(config, guarded(programs, programs.rollout_command(run, stage, node))),
            )
            log = f"srun_rollout_{node}.log"
            units.append(Unit("rollout", node, command, env, log, restarts=cluster.rollout_restarts, step=True))
    return units


def guarded(programs: Programs, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command under a guard on its node, so that a killed role leaves no worker of its own behind."""
    return (programs.python, *GUARD_ARGUMENTS, ALONE, *command)


def probe_command(config: Config, run: RunFolder, programs: Programs, hosts: list[str]) -> tuple[str, ...]:
    """One task per node that names what the node lacks: the run folder, the interpreter, the packages."""
    programs = inside(config, programs)
    folder, python = shlex.quote(str(run.config)), shlex.quote(programs.python)
    script = f"""
        where=$SLURMD_NODENAME
        lacks() {{ echo "$where: $1"; exit 3; }}
        test -r {folder} || lacks "does not see {run.config}: run.dir must be on a shared file system"
        command -v {python} >/dev/null || lacks "has no interpreter {programs.python}: see cluster.python"
        said=$({python} -c 'import importlib.util as u, sys
missing = [name for name in ("torch", "omegaconf", "megatron_vcppo") if u.find_spec(name) is None]
sys.exit("the Python environment lacks " + ", ".join(missing) if missing else 0)' 2>&1) ||
            lacks "{programs.python}: $said: see cluster.setup"
    """
    return (*step(config, hosts, 1, 1), "--job-name=probe", *in_container(config, ("sh", "-c", script)))
