"""Puts the chain into Slurm: one job per stage, each after the success of the one before, all or none."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.config.rules.slurm_options import CONTROL
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.checks import check_inputs, check_run_folder
from megatron_vcppo.launch.inherit import take_stages
from megatron_vcppo.launch.role_commands import ROLE_COMMANDS, RoleCommands
from megatron_vcppo.launch.save_timing import signal_margin_s
from megatron_vcppo.launch.snapshot import take_snapshot
from megatron_vcppo.run import events
from megatron_vcppo.run.access import following
from megatron_vcppo.run.config_file import config_undone, write_config
from megatron_vcppo.run.files import replacing
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.job import StageJob
from megatron_vcppo.slurm.slurm_cli import (
    JobState,
    Unreadable,
    check_scripts,
    check_slurm_installed,
    commands_folder,
    job_states,
    site_environment,
    slurm,
    slurm_message,
    unreadable,
)
from megatron_vcppo.slurm.srun import job_config, stage_nodes

EXPORT_GB, EXPORT_BYTES_PER_PARAMETER = 16, 5
"""Memory of an export: files in parts, then one model at a time in float32, whose logits are compared."""
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's executor, able to show its batch script on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Usable also where srun is not installed."""
        return 2

    def script(self) -> str:
        """The text that sbatch would get."""
        return str(self._make_submission_file_text(self._submitit_command_str, "dry-run"))

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """Of sbatch's own line only: a wrapper may speak of jobs, too."""
        text = string.decode(errors="replace") if isinstance(string, bytes) else string
        found = re.search(r"Submitted batch job (\d+)", text)
        if not found:
            raise Unreadable(f"{unreadable('sbatch', text)} the job may be queued nevertheless: see squeue --me")
        return found[1]


def executor(
    run: RunFolder, config: Config, stage: str, code: Path, role_commands: RoleCommands, after: str | None
) -> ScriptExecutor:
    """The batch job of one stage: a controller on its first node, signalled before the time limit."""
    cluster = job_config(config, stage).cluster
    made = ScriptExecutor(folder=run.slurm, python="exec " + shlex.quote(role_commands.python))
    minutes = cluster.stage_time_limit_minutes.get(stage, cluster.time_limit_minutes)
    extra: dict[str, Any] = {
        "signal": f"B:USR2@{signal_margin_s(run, stage, cluster.save_margin_s, 60 * minutes)}",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **{name: True if value == "true" else value for name, value in site_options(config, stage).items()},
    }
    setup = [
        f"export PATH=${{PATH:-{DEFAULT_PATH}}}",  # a site's --export may leave none
        f"command -v srun >/dev/null || PATH=$PATH:{shlex.quote(commands_folder())}",
        *cluster.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "trap '' USR2",  # until the controller listens: a signal during its imports would end the job as failed
        "export PYTHONSAFEPATH=1",  # else the folder in which it was submitted would come before the snapshot
    ]
    parameters = {
        "job_name": f"{run.path.name}.{stage}",
        "time": minutes,
        "nodes": stage_nodes(config, stage),
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_node,
        "dependency": f"afterok:{after}" if after else None,
        "wckey": None,  # submitit's default is a key of its own
        "setup": setup,
        "use_srun": False,
        "stderr_to_stdout": True,
        "additional_parameters": extra,
    }
    _check_one_line({**parameters, **extra, "run.dir": run.path, "cluster.python": made.python})
    made.update_parameters(**parameters)
    return made


def site_options(config: Config, stage: str) -> dict[str, str]:
    """What the stage's job requests besides nodes, CPUs and time, by the long names of sbatch and srun.

    Example: ``{"partition": "gpu", "mem": "900GB", "exclusive": "true"}``, where the last is a flag.
    """
    cluster, memory_gb = job_config(config, stage).cluster, requested_memory_gb(config, stage)
    options = {name: getattr(cluster, name) for name in ("partition", "account", "qos", "wckey")}
    options["gpus-per-node"] = str(cluster.gpus_per_node or "") if "gres" not in cluster.sbatch else None
    options["mem"] = None if memory_gb is None else memory_text(memory_gb)
    return {name: value for name, value in options.items() if value} | cluster.sbatch


def _check_one_line(parameters: Mapping[str, Any]) -> None:
    """UserError if a value, or a name, would become another line of a batch script; only setup consists of lines."""
    for name, value in parameters.items():
        if name not in ("setup", "additional_parameters") and CONTROL.search(f"{name}{value}"):
            raise UserError(f"the batch script would have a control character in {name!r}, {str(value)!r}: remove it")


def requested_memory_gb(config: Config, stage: str) -> float | None:
    """Main memory in GB that the stage's job requests per node; None: the cluster's default."""
    limit = job_config(config, stage).cluster.memory_per_node_gb
    given = (config.overrides.get(stage) or {}).get("cluster", {})
    if limit is None or stage != "export" or "memory_per_node_gb" in given:
        return limit
    needed = EXPORT_GB + EXPORT_BYTES_PER_PARAMETER * Architecture.from_hf(config.model.hf).parameter_count() / 1e9
    return min(limit, float(round(needed)))


def memory_text(gb: float) -> str:
    """As Slurm reads it, which knows whole numbers only. Example: 900 → 900GB, 1.5 → 1536MB."""
    return f"{gb:.0f}GB" if gb == round(gb) else f"{max(1, round(1024 * gb))}MB"


def memory_request(config: Config, stage: str) -> str:
    """The main memory that the stage's job requests, as text."""
    options = {name.replace("_", "-"): value for name, value in job_config(config, stage).cluster.sbatch.items()}
    if options.get("mem") == "0":  # sbatch's word for it
        return "all of each node"
    for name, unit in (("mem", "node"), ("mem-per-cpu", "CPU"), ("mem-per-gpu", "GPU")):
        if name in options:
            return f"{options[name]} per {unit}"
    memory_gb = requested_memory_gb(config, stage)
    return "the cluster's default" if memory_gb is None else f"{memory_text(memory_gb)} per node"


def request_text(config: Config, stage: str) -> str:
    """What the stage's job requests from Slurm, as text."""
    cluster = job_config(config, stage).cluster
    gpus = f"{cluster.gpus_per_node} GPUs and " if cluster.gpus_per_node else ""
    text = f"requested {stage_nodes(config, stage)} nodes with {gpus}{cluster.cpus_per_node} CPUs each"
    names = [
        f"{name} {value}" for name in ("partition", "account", "qos", "wckey") if (value := getattr(cluster, name))
    ]
    return ", ".join([text, *names])


def submitted_jobs(run: RunFolder) -> dict[str, str]:
    """The newest job of each stage, by stage."""
    return {event["stage"]: event["job"] for event in events.read(run.path) if event["event"] == "submitted"}


def active_jobs(run: RunFolder) -> list[JobState]:
    """Jobs of this run that Slurm has not ended."""
    jobs = [event["job"] for event in events.read(run.path) if event["event"] == "submitted"]
    return [state for state in job_states(jobs).values() if state.active]


def check_not_active(run: RunFolder) -> None:
    """UserError if jobs of this run are queued or at work: they read its configuration."""
    if active := active_jobs(run):
        jobs = ", ".join(f"{state.job_id} ({state.state})" for state in active)
        raise UserError(f"{run.path}: this run is active, jobs {jobs}; see vcppo status, or vcppo cancel it first")


def pending_stages(run: RunFolder, stages: list[str]) -> list[str]:
    """The stages that are not done, in order."""
    return [stage for stage in stages if not run.stage(stage).is_done()]


def dry_run(run: RunFolder, config: Config, stages: list[str], role_commands: RoleCommands = ROLE_COMMANDS) -> Path:
    """Write every batch script, the dependency graph and the configuration to RUN/slurm/dry_run; returns that folder.

    A RUN/config.yaml that is there stays as it is: jobs of the run may be reading it.
    """
    needs = check_inputs(config, pending_stages(run, stages))
    folder = run.slurm / "dry_run"
    before, graph, texts = None, [], {}
    for stage in pending_stages(run, stages):
        made = executor(run, config, stage, run.code / "SNAPSHOT", role_commands, before and f"JOB_OF_{before}")
        texts[f"{stage}.sh"] = made.script()
        line = f"{stage}: {stage_nodes(config, stage)} nodes, about {needs[stage]:.0f} GiB per rank, "
        line += f"requested main memory: {memory_request(config, stage)}"
        graph.append(line + (f", after the success of {before}" if before else ""))
        before = stage
    texts |= {RunFolder(folder).config.name: dump_config(config), "graph.txt": "\n".join(graph) + "\n"}
    with following(config.run.access), run.removed_if_new():
        check_run_folder(run)
        if not run.config.exists():
            write_config(run, config)
        folder.parent.mkdir(exist_ok=True)
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
    return folder


def submit(
    run: RunFolder,
    config: Config,
    stages: list[str],
    role_commands: RoleCommands = ROLE_COMMANDS,
    taken: Sequence[Path] = (),
) -> dict[str, str]:
    """Queue the stages that are not done; returns their job ids.

    taken: finished stages of another run to begin with (launch/inherit.py).
    If anything is refused, nothing stays queued, and the configuration that the run had stays, too.
    """
    check_slurm_installed()
    check_run_folder(run)
    with following(config.run.access), run.locked():
        check_not_active(run)
        todo = pending_stages(run, stages)
        if not todo:
            return {}
        code = take_snapshot(run)
        run.slurm.mkdir(exist_ok=True)
        scripts = [executor(run, config, stage, code, role_commands, None).script() for stage in todo]
        asked = [request_text(config, stage) for stage in todo]
        check_scripts(zip(scripts, asked, strict=True), run.slurm)
        with config_undone(run):
            write_config(run, config)
            take_stages(run, taken)
            return _queue(run, config, todo, code, role_commands)


def _queue(run: RunFolder, config: Config, todo: list[str], code: Path, role_commands: RoleCommands) -> dict[str, str]:
    """The jobs of these stages by stage, each after the one before; all or none."""
    jobs_of: dict[str, str] = {}
    try:
        before = None
        for stage in todo:
            made = executor(run, config, stage, code, role_commands, before)
            with site_environment(made.script()):
                before = made.submit(StageJob(run.path, stage, role_commands)).job_id
            jobs_of[stage] = before
            events.append(run.path, "submitted", stage=stage, job=before, code=code.name)
    except FailedJobError as error:
        cancel_jobs(list(jobs_of.values()))
        raise UserError(f"Slurm refuses the job of {stage}: {slurm_message(str(error))}") from None
    except BaseException:
        cancel_jobs(list(jobs_of.values()))
        raise
    return jobs_of


def cancel_jobs(jobs: list[str]) -> None:
    """scancel; dependents first, so that none starts meanwhile."""
    if jobs:
        slurm("scancel", *reversed(jobs))


def resolve_python(config: Config) -> RoleCommands:
    """The role_commands with the profile's interpreter."""
    return RoleCommands(python=config.cluster.python or sys.executable)
