"""The state of a run, stage by stage: from its own files first, from Slurm for what is queued or running."""

import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from megatron_vcppo.config import Config
from megatron_vcppo.errors import DONE, SAVED, UserError
from megatron_vcppo.launch.save_timing import iteration_seconds
from megatron_vcppo.report.text_table import text_table
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import last_lines, printable
from megatron_vcppo.run.usage import gpu_hours
from megatron_vcppo.slurm.slurm_cli import JobState, first_node, job_states
from megatron_vcppo.slurm.srun import job_config, stage_nodes
from megatron_vcppo.slurm.submission import submitted_jobs

SHOWN_METRICS = 3


@dataclass
class StageStatus:
    """One line of the table."""

    stage: str
    state: str
    """done | damaged | running | pending | requeued | failed | cancelled | saved | not started"""
    job: str = ""
    attempts: int = 0
    iteration: int | None = None
    total: int | None = None
    eta_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    gpu_hours: float = 0.0
    """GPUs of its jobs times the hours that they held them."""
    expected_start: str | None = None
    """Of a pending job, if Slurm says so: an ISO time of this machine's time zone."""
    note: str = ""
    """Why it is pending, or how it failed and what to do."""


def run_status(run: RunFolder, config: Config) -> list[StageStatus]:
    """One status per stage of the chain. Looks at sizes, not checksums, so that it stays fast.

    Slurm is asked about stages that are not done only: a finished run can be looked at anywhere.
    """
    asked = [job for stage, job in submitted_jobs(run).items() if not run.stage(stage).marked_done()]
    return chain_status(run, config, job_states(asked))


def chain_status(run: RunFolder, config: Config, states: dict[str, JobState]) -> list[StageStatus]:
    """The same from the states of the run's jobs."""
    jobs, log = submitted_jobs(run), events.read(run.path)
    statuses = []
    for stage in config.stages:
        status = stage_status(run, stage, jobs.get(stage, ""), states, log)
        nodes = stage_nodes(config, stage) if status.job else 1
        gpus = nodes * job_config(config, stage).cluster.gpus_per_node
        mine = [event for event in log if event.get("stage") == stage]
        status.gpu_hours = round(gpu_hours(mine, gpus, time.time() if status.state == "running" else None), 2)
        statuses.append(status)
    return statuses


def stage_status(
    run: RunFolder, stage: str, job: str, states: dict[str, JobState], log: list[dict[str, Any]]
) -> StageStatus:
    """What is known about one stage."""
    mine = [event for event in log if event.get("stage") == stage]
    status = StageStatus(stage, "not started", job, attempts=len(run.stage(stage).attempts()))
    add_progress(status, run)
    try:
        done = run.stage(stage).is_done(checksums=False)
    except UserError as error:
        status.state, status.note = (
            "damaged",
            str(error).splitlines()[-1].strip() + ": remove the stage's manifest.json",
        )
        return status
    slurm_state = states.get(job)
    if done:
        status.state = "done"
    elif slurm_state and slurm_state.active:
        waiting = slurm_state.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
        status.state = "pending" if waiting else "running"
        status.note = pending_note(slurm_state) if waiting else leaving_note(mine)
        status.expected_start = slurm_state.expected_start if waiting else None
    else:
        add_ending(status, run, mine, slurm_state)
    if status.state != "running":
        status.eta_s = None
    return status


def pending_note(state: JobState) -> str:
    """Why a job waits, as text."""
    words = {
        "Dependency": "waits for the stage before",
        "Priority": "other jobs come first",
        "Resources": "waits for free nodes",
        "BeginTime": "was requeued, starts soon",
    }
    text = words.get(state.reason, state.reason)
    if "held" in state.reason.lower():
        return f"{text}: once its cause is fixed, scontrol release {state.job_id}"
    return text + (f", expected {state.expected_start}" if state.expected_start else "")


def leaving_note(mine: list[dict[str, Any]]) -> str:
    """When a stage was asked to save and how long it may take; "" if it was not."""
    kinds = ("attempt", "save_requested", "attempt_end")
    last = next((event for event in reversed(mine) if event["event"] in kinds), None)
    if last is None or last["event"] != "save_requested":
        return ""
    asked = time.strftime("%H:%M:%S", time.localtime(last["time"]))
    return f"asked at {asked} to save and leave within {last['seconds']} s"


def add_progress(status: StageStatus, run: RunFolder) -> None:
    """Iteration, total, ETA and newest metrics from metrics.jsonl."""
    records = [
        record for record in run.stage(status.stage).recent_metrics() if isinstance(record.get("iteration"), int)
    ]
    if not records:
        status.iteration = run.stage(status.stage).checkpoint_iteration()
        return
    newest = records[-1]
    total = newest.get("total_iterations")
    status.iteration, status.total = newest["iteration"], total if isinstance(total, int) else None
    shown = {
        key: value
        for key, value in newest.items()
        if isinstance(value, float) and not key.startswith("time") and key != "timestamp"
    }
    status.metrics = dict(list(shown.items())[:SHOWN_METRICS])
    seconds = iteration_seconds(run, status.stage)[-20:]
    if status.total and seconds:
        status.eta_s = (status.total - status.iteration) * sum(seconds) / len(seconds)


def add_ending(status: StageStatus, run: RunFolder, mine: list[dict[str, Any]], slurm_state: JobState | None) -> None:
    """How a stage that is neither done nor queued ended, and what to do."""
    go_on = f"vcppo resume {run.path}"
    last = next((event for event in reversed(mine) if event["event"] in ("attempt_end", "refused", "attempt")), None)
    if slurm_state and slurm_state.state.startswith("CANCELLED"):
        status.state, status.note = "cancelled", f"continue with: {go_on}"
        if last is None:
            status.note = f"never started; once the stage before is fixed: {go_on}"
    elif last is None:
        if slurm_state:
            lines = last_lines(run.job_log(status.job), 1)
            status.state = "failed"
            status.note = (
                f"Slurm says {slurm_state.state} {slurm_state.reason}; its controller never started on "
                f"{first_node(slurm_state.nodes) or 'any node'}: "
                + (lines[0] if lines else f"is {run.path} on a shared file system?")
                + f"; vcppo doctor checks the nodes; then {go_on}"
            )
    elif last["event"] == "attempt":
        if not slurm_state and run.in_use():
            leaving = leaving_note(mine)
            status.state, status.note = "running", "on this machine" + (f"; {leaving}" if leaving else "")
        else:
            verdict = f"Slurm says {slurm_state.state}" if slurm_state else "ended without a word, as by a power cut"
            status.state, status.note = "failed", f"{verdict}; {go_on}"
    elif last.get("code") == SAVED:
        status.state, status.note = "saved", f"continue with: {go_on}"
    elif last.get("code") != DONE:
        details = last.get("details")
        line = details[-1] if isinstance(details, list) and details else ""
        status.state = "failed"
        status.note = str(last.get("cause", "")) + (f": {line}" if line else "") + f"; fix it, then {go_on}"


def table(statuses: list[StageStatus], stream: TextIO | None = None) -> str:
    """The statuses as text: a row per stage, then the newest metrics of unfinished stages and all notes.

    stream: where it will be printed, see text_table.
    """
    rows: list[dict[str, object]] = []
    notes = []
    used = sum(status.gpu_hours for status in statuses)
    for status in statuses:
        total = f"/{status.total}" if status.total else ""
        rows.append(
            {
                "stage": status.stage,
                "state": status.state,
                "job": status.job,
                "attempts": status.attempts or "",
                "iteration": "" if status.iteration is None else f"{status.iteration}{total}",
                "ETA": "" if status.eta_s is None else duration(status.eta_s),
                **({"GPU-hours": f"{status.gpu_hours:.2f}"} if used else {}),
            }
        )
        if status.metrics and status.state != "done":
            values = "  ".join(f"{key} {value:.4g}" for key, value in status.metrics.items())
            notes.append(f"{status.stage}: {values}")
        if status.note:
            notes.append(f"{status.stage}: {status.note}")
    if used:
        notes.append(f"GPU-hours used: {used:.2f}")
    return "\n".join([text_table(rows, stream), *map(printable, notes)])


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
