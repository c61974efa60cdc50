"""The roles of a stage as srun steps inside one allocation: pure functions from the layout to command lines."""

import shlex
from dataclasses import replace
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES, engine_placement
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.launch.controller import RoleProcess
from megatron_vcppo.launch.guard import ALONE, GUARD_ARGUMENTS
from megatron_vcppo.launch.role_commands import RoleCommands, role_environment, starts_engines, trainer_layout
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE
from megatron_vcppo.slurm.marked_lines import ANSWER, FINDING

JOB_LAYOUT = (
    "NTASKS", "NPROCS", "NTASKS_PER_NODE", "TASKS_PER_NODE", "NTASKS_PER_SOCKET", "NTASKS_PER_CORE", "NTASKS_PER_GPU",
    "NTASKS_PER_TRES", "CPUS_PER_TASK", "CPUS_PER_GPU", "THREADS_PER_CORE", "TRES_PER_TASK", "GPUS", "GPUS_PER_NODE",
    "GPUS_PER_TASK", "GPUS_PER_SOCKET", "GPU_BIND", "TRES_BIND", "GRES", "GRES_FLAGS", "CPU_BIND", "CPU_BIND_LIST",
    "CPU_BIND_TYPE", "CPU_BIND_VERBOSE", "MEM_BIND", "MEM_BIND_LIST", "MEM_BIND_PREFER", "MEM_BIND_SORT",
    "MEM_BIND_TYPE", "MEM_BIND_VERBOSE", "DISTRIBUTION", "DIST_PLANESIZE", "HINT", "HOSTFILE", "EXACT", "EXCLUSIVE",
    "SPREAD_JOB", "USE_MIN_NODES", "EXPORT_ENV",
)  # fmt: skip
"""Variables (SLURM_…) of the batch job, or of the site, that srun takes for options: they would change a step's own
layout or show a task only some of the GPUs. They are removed for the steps."""
STEP_ENVIRONMENT = {f"SLURM_{name}": "" for name in JOB_LAYOUT} | {"SRUN_CPUS_PER_TASK": "", "SRUN_EXPORT_ENV": ""}
"""For every srun of a job; an empty value removes the variable."""
RANK_SHELL = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
"""Slurm's words for a rank's place, in ours."""
NETWORK_CHECK = """
import sys
from megatron_vcppo.config import ClusterConfig
from megatron_vcppo.config.network import node_network
from megatron_vcppo.errors import UserError
try:
    node_network(ClusterConfig(**{keys}))
except UserError as error:
    print({finding!r} + str(error))
    sys.exit(1)
"""
EXPORT_CPUS = 8


def job_config(config: Config, stage: str) -> Config:
    """The configuration as the stage's job reads it: with the stage's overrides, and what it requests of a node.

    An export is one process that moves files: it requests no GPUs and no exclusive node, unless ``overrides.export``
    does. config: the run's, as it is stored.
    """
    own, given = stage_config(config, stage), (config.overrides.get(stage) or {}).get("cluster", {})
    if stage != "export":
        return own
    sbatch = own.cluster.sbatch
    if "sbatch" not in given:
        sbatch = {name: value for name, value in sbatch.items() if name not in ("exclusive", "gres")}
    cluster = replace(
        own.cluster,
        sbatch=sbatch,
        trainer_nodes=1,
        trainer_ranks=1,
        gpus_per_node=given.get("gpus_per_node", 0),
        cpus_per_node=given.get("cpus_per_node", min(own.cluster.cpus_per_node, EXPORT_CPUS)),
    )
    return replace(own, cluster=cluster, overrides={})


def stage_nodes(config: Config, stage: str) -> int:
    """Nodes of a stage's allocation: rollout nodes are requested only where something may be generated."""
    nodes, _ = trainer_layout(config, stage)
    return nodes + (stage_config(config, stage).cluster.rollout_nodes if stage in ENGINE_STAGES else 0)


def in_container(config: Config, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command inside the profile's apptainer image; pyxis needs no wrapping, it is an srun option."""
    cluster = config.cluster
    if not cluster.container_image or cluster.container_runtime == "pyxis":
        return command
    gpu = ("--nv",) if cluster.gpus_per_node else ()
    mounts = ("--bind", cluster.container_mounts) if cluster.container_mounts else ()
    return ("apptainer", "exec", *gpu, *mounts, cluster.container_image, *command)


def inside(config: Config, role_commands: RoleCommands) -> RoleCommands:
    """The commands with the interpreter of the image, if there is one."""
    cluster = config.cluster
    if not cluster.container_image or not cluster.container_python:
        return role_commands
    return replace(role_commands, python=cluster.container_python)


def step(config: Config, nodes: list[str], tasks_per_node: int, cpus_per_task: int) -> tuple[str, ...]:
    """srun with its own task layout on some of the job's nodes; steps share the nodes' CPUs and GPUs.

    srun does not kill a step whose task ended badly, the controller does: a rank that saved and left with 75 must not
    take those along that are still writing.
    """
    cluster = config.cluster
    # --distribution: consecutive ranks on a node, whatever the site's default is
    argv = [
        "srun",
        "--overlap",
        "--kill-on-bad-exit=0",
        "--wait=0",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={tasks_per_node * len(nodes)}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus_per_task}",
        "--distribution=block",
        "--open-mode=append",
        "--input=none",
    ]
    if cluster.gpus_per_node:  # every task sees all GPUs of its node, in one order; ranks and engines choose theirs
        gres = cluster.sbatch.get("gres")
        argv += [f"--gres={gres}" if gres else f"--gpus-per-node={cluster.gpus_per_node}", "--gpu-bind=none"]
    if cluster.container_image and cluster.container_runtime == "pyxis":
        argv.append(f"--container-image={cluster.container_image}")
        if cluster.container_mounts:
            argv.append(f"--container-mounts={cluster.container_mounts}")
    argv += [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in cluster.srun.items()]
    return tuple(argv)


def srun_processes(
    *,
    run: RunFolder,
    config: Config,
    stage: str,
    role_commands: RoleCommands,
    hosts: list[str],
    address: str,
    port: int,
    logs: Path,
) -> list[RoleProcess]:
    """One step for all trainer ranks on the first nodes; one per node with engines, so that it can be restarted alone.

    hosts: the job's nodes by name. address, port: where rank 0, on the first of them, serves the ranks' store.
    """
    config = stage_config(config, stage)
    cluster, role_commands = config.cluster, inside(config, role_commands)
    nodes, ranks_per_node = trainer_layout(config, stage)
    trainers = hosts[:nodes]
    cpus = max(1, cluster.cpus_per_node // ranks_per_node)
    command = (
        *step(config, trainers, ranks_per_node, cpus),
        "--job-name=trainer",
        f"--output={logs}/trainer_%t.log",
        *in_container(
            config, ("sh", "-c", RANK_SHELL, "rank", *guarded(role_commands, role_commands.trainer_command(run, stage)))
        ),
    )
    env = STEP_ENVIRONMENT | role_environment(config, "trainer")
    place = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    place |= {SECRET_FILE_VARIABLE: str(run.stage(stage).secret.absolute())}
    processes = [
        RoleProcess(
            role="trainer",
            index=0,
            command=command,
            env=env | place,
            log="srun_trainer.log",
            shown_log="trainer_0.log",
            task_nodes=tuple(host for host in trainers for _ in range(ranks_per_node)),
        )
    ]
    if starts_engines(config, stage):
        env = STEP_ENVIRONMENT | role_environment(config, "rollout")
        own_nodes = engine_placement(config) == "rollout_nodes"
        for node, host in enumerate(hosts[cluster.trainer_nodes :] if own_nodes else trainers):
            command = (
                *step(config, [host], 1, cluster.cpus_per_node),
                "--job-name=rollout",
                f"--output={logs}/rollout_{node}.log",
                *in_container(config, guarded(role_commands, role_commands.rollout_command(run, stage, node))),
            )
            processes.append(
                RoleProcess(
                    role="rollout",
                    index=node,
                    command=command,
                    env=env,
                    log=f"srun_rollout_{node}.log",
                    restarts=cluster.rollout_restarts,
                    task_nodes=(host,),
                )
            )
    return processes


def guarded(role_commands: RoleCommands, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command under a guard on its node, so that a killed role leaves none of its workers behind."""
    return (role_commands.python, *GUARD_ARGUMENTS, ALONE, *command)


def probe_command(config: Config, run: RunFolder, role_commands: RoleCommands, hosts: list[str]) -> tuple[str, ...]:
    """One task per node that names what the node lacks: run folder, interpreter, packages, network interface.

    Where it lacks nothing, the node's own name.
    """
    role_commands = inside(config, role_commands)
    folder, python = shlex.quote(str(run.config)), shlex.quote(role_commands.python)
    cluster = config.cluster
    keys = {name: getattr(cluster, name) for name in ("name", "trainer_nodes", "rollout_nodes", "network_interface")}
    network = shlex.quote(NETWORK_CHECK.format(keys=keys, finding=FINDING))
    script = f"""
        where=$SLURMD_NODENAME
        lacks() {{ echo "{FINDING}$where: $1"; exit 3; }}
        test -r {folder} || lacks "does not see {run.config}: run.dir must be on a shared file system"
        command -v {python} >/dev/null || lacks "has no interpreter {role_commands.python}: see cluster.python"
        problem=$({python} -c 'import importlib.util as u, sys
missing = [name for name in ("torch", "omegaconf", "megatron_vcppo") if u.find_spec(name) is None]
sys.exit("the Python environment lacks " + ", ".join(missing) if missing else 0)' 2>&1) ||
            lacks "{role_commands.python}: $problem: see cluster.setup"
        {python} -c {network} || exit 3
        echo "{ANSWER}$where"
    """
    return (*step(config, hosts, 1, 1), "--job-name=probe", *in_container(config, ("sh", "-c", script)))
