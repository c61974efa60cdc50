"""Checks a cluster profile step by step: each check is one line, and says what to change where it fails."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.config.network import num_nodes
from megatron_vcppo.config.placement import engine_nodes
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.report.text_table import styled
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm import doctor_findings
from megatron_vcppo.slurm.marked_lines import ANSWER, FINDING, marked
from megatron_vcppo.slurm.slurm_cli import (
    check_scripts,
    check_slurm_installed,
    command_environment,
    slurm,
    slurm_message,
    unreadable,
    user_defaults,
)
from megatron_vcppo.slurm.srun import in_container, inside, probe_command, step
from megatron_vcppo.slurm.submission import executor, request_text, site_options

WAIT_FOR_NODES_S = 120
JOB_MINUTES = 8
TEST_JOB_TIMEOUT_S = WAIT_FOR_NODES_S + 60 * JOB_MINUTES
NOT_OF_A_TEST = frozenset(
    {
        "array", "batch", "begin", "deadline", "dependency", "error", "export", "export-file", "get-user-env", "hold",
        "ignore-pbs", "input", "kill-on-invalid-dep", "mail-type", "mail-user", "no-requeue", "output", "parsable",
        "requeue", "signal", "time-min", "wait", "wait-all-nodes",
    }
)  # fmt: skip
"""Options of a batch script that srun lacks or takes otherwise, and those that delay, redirect or announce a job."""


def checks(config: Config, role_commands: RoleCommands, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and body of every check, in order; a body returns what it found or raises UserError with what to do."""
    cluster = config.cluster
    config_file = RunFolder(folder).config
    config_file.write_text(dump_config(config))

    def commands() -> str:
        check_slurm_installed()
        return answered("sbatch", "--version", form=r"^slurm\S* \d.*")[0]

    def controller() -> str:
        return answered("scontrol", "ping", form="^Slurmctld.*")[0]

    def partition() -> str:
        wanted = ("-p", cluster.partition) if cluster.partition else ()
        lines = marked(slurm("sinfo", "-h", *wanted, "-o", f"{ANSWER}%P %D %t %c %G"), ANSWER)
        if not lines:
            known = sorted(set(answered("sinfo", "-h", "-o", f"{ANSWER}%R", form=f"(?<={ANSWER}).*")))
            raise UserError(f"no partition {cluster.partition}; there are: {', '.join(known)}: set cluster.partition")
        return "; ".join(lines)

    def request() -> str:
        run = RunFolder(folder)
        check_scripts(
            [(executor(run, config, "ppo", folder, role_commands, None).script(), request_text(config, "ppo"))], folder
        )
        return f"{cluster.trainer_nodes} + {cluster.rollout_nodes} nodes would be granted"

    def nodes() -> str:
        lines = test_job(config, probe_command(config, RunFolder(folder), role_commands, hosts=[]))
        doctor_findings.answers(lines, num_nodes(cluster))
        return f"all {num_nodes(cluster)} see {folder}, have the Python environment and the network"

    def probe(name: str, *arguments: str, **layout: int) -> list[str]:
        module = f"megatron_vcppo.slurm.{name}_probe"
        argv = in_container(config, (inside(config, role_commands).python, "-m", module, *arguments))
        return test_job(config, (*step(config, [], 1, 1), *argv), **layout)

    software = functools.cache(lambda: doctor_findings.records(probe("software"), num_nodes(cluster)))

    def collective() -> str:
        tasks = cluster.gpus_per_node or 1
        lines = probe("allreduce", str(config_file), tasks_per_node=tasks)
        return doctor_findings.collective(doctor_findings.records(lines, tasks * num_nodes(cluster)), cluster)

    def engines() -> str:
        nodes = engine_nodes(config)
        lines = probe("engine", str(config_file), nodes=nodes, cpus_per_task=cluster.cpus_per_node)
        return doctor_findings.engines(doctor_findings.records(lines, nodes))

    def isolation() -> str:
        return "; ".join(doctor_findings.answers(probe("isolation"), num_nodes(cluster)))

    yield "Slurm's commands", commands
    yield "Slurm's controller", controller
    yield "partition", partition
    yield "account, qos, nodes, GPUs", request
    yield "file system, Python, network", nodes
    if cluster.gpus_per_node:
        yield "driver", lambda: doctor_findings.driver(software())
        yield "Transformer Engine", lambda: doctor_findings.transformer_engine(software())
        yield "compiler", lambda: doctor_findings.compiler(software())
    yield "collective" if not cluster.gpus_per_node else "GPUs and collective", collective
    yield "engine", engines
    yield "isolation of programs (rewards.code)", isolation


def answered(*argv: str, form: str) -> list[str]:
    """What one of Slurm's commands answers: the parts of its lines of this form. Unreadable if it has none."""
    text = slurm(*argv)
    found = re.findall(form, text, re.MULTILINE)
    if not found:
        raise unreadable(" ".join(argv[:2]), text)
    return found


def test_job(
    config: Config, argv: tuple[str, ...], nodes: int | None = None, tasks_per_node: int = 1, cpus_per_task: int = 1
) -> list[str]:
    """Run a step's command line in a separate allocation, bounded; default: on all nodes. Returns its marked lines.

    It requests what the job of ppo does, but for the options that only a batch script has, or that delay a job.
    """
    nodes = nodes or num_nodes(config.cluster)
    site = user_defaults(os.environ) | site_options(config, "ppo")
    options = {
        **{name: value for name, value in site.items() if name not in NOT_OF_A_TEST},
        "kill-on-bad-exit": 1,
        "nodes": nodes,
        "ntasks": nodes * tasks_per_node,
        "ntasks-per-node": tasks_per_node,
        "cpus-per-task": cpus_per_task,
        "time": JOB_MINUTES,
        "immediate": WAIT_FOR_NODES_S,
    }
    replaced = tuple(f"--{name}=" for name in (*options, "nodelist", "open-mode"))
    kept = [argument for argument in argv[1:] if not argument.startswith(replaced) and argument != "--overlap"]
    given = (f"--{name}" if value == "true" else f"--{name}={value}" for name, value in options.items())
    return marked(run_bounded(["srun", *given, *kept]), ANSWER)


def run_bounded(argv: list[str]) -> str:
    """Output of a command of Slurm's; UserError with the first thing that a task finds wrong, or Slurm's complaint."""
    try:
        done = subprocess.run(
            argv,
            env=command_environment(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TEST_JOB_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the test job did not end in {TEST_JOB_TIMEOUT_S} s") from None
    if found := marked(done.stdout, FINDING):
        raise UserError(found[0])
    if done.returncode:
        said = slurm_message(done.stderr) or slurm_message(done.stdout)
        raise UserError(said[-600:] or f"exit code {done.returncode}")
    return done.stdout


def examine(config: Config, role_commands: RoleCommands, parent: Path) -> bool:
    """Print one line per check; True if all passed. A check after a failed one may still be of use, so all run."""
    folder = Path(tempfile.mkdtemp(prefix=".vcppo_doctor_", dir=parent))
    good = True
    try:
        for name, check in checks(config, role_commands, folder):
            try:
                print(f"{styled('ok', sys.stdout)}    {name}: {check()}", flush=True)
            except UserError as error:
                good = False
                print(f"{styled('FAIL', sys.stdout)}  {name}: {error}", flush=True)
                if name == "Slurm's commands":
                    break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return good
