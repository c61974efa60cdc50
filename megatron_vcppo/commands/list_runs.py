"""vcppo list: the runs below a folder."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vcppo.run.folder import RunFolder
    from megatron_vcppo.slurm.slurm_cli import JobState


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "list", description="The runs below a folder: the stage where each stands, its state, age, last event and size."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument("--json", action="store_true", help="print a list of objects as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One row per run. Slurm is asked once, about all of their jobs."""
    from megatron_vcppo.commands.arguments import print_note
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.report.text_table import text_table
    from megatron_vcppo.run.log import printable
    from megatron_vcppo.run.usage import runs_below
    from megatron_vcppo.slurm.slurm_cli import job_states

    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder: name the one that holds your runs")
    found = list(runs_below(args.folder.absolute()))
    jobs = [job for one in found for job in open_jobs(one)]
    states: dict[str, JobState] | None = {}
    try:
        states = job_states(jobs)
    except UserError as error:
        states = None
        print_note(f"note: the states of jobs are unknown: {error}")
    records = [record_of(one, states) for one in found]
    if args.json:
        print(json.dumps(records, indent=2))
    elif records:
        print(text_table([row_of(record, args.folder.absolute()) for record in records], sys.stdout))
    else:
        print(printable(f"no runs below {args.folder}"))
    return 0


def open_jobs(run: "RunFolder") -> list[str]:
    """The jobs of stages that are not done; none if the run cannot be read."""
    from megatron_vcppo.slurm.submission import submitted_jobs

    try:
        return [job for stage, job in submitted_jobs(run).items() if not run.stage(stage).marked_done()]
    except OSError:
        return []


def record_of(run: "RunFolder", states: "dict[str, JobState] | None") -> dict[str, Any]:
    """What is known about one run. states: of its jobs, None if Slurm does not answer."""
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.run import events
    from megatron_vcppo.run.config_file import open_run
    from megatron_vcppo.run.usage import size_bytes
    from megatron_vcppo.slurm.chain_status import chain_status

    written = run.config.stat().st_mtime
    record: dict[str, Any] = {"run": str(run.path), "stage": "", "state": "unreadable", "iteration": None}
    record |= {"total": None, "begun": written, "last_event": written, "size_bytes": size_bytes(run.path)}
    try:
        times = [event["time"] for event in events.read(run.path)] or [written]
        record |= {"begun": min(times), "last_event": max(times)}
        _, config = open_run(run.path, complete=False)
        statuses = chain_status(run, config, states or {})
        unknown_jobs = open_jobs(run) if states is None else []
    except (UserError, OSError) as error:  # one run of many, or someone else's
        return record | {"note": str(error)}
    unfinished = [status for status in statuses if status.state != "done"]
    now = next((status for status in unfinished if status.state != "not started"), (unfinished or statuses)[-1])
    if unfinished and now.state == "not started":
        now = unfinished[0]
    unknown = now.job in unknown_jobs
    record |= {"stage": now.stage, "state": "unknown" if unknown else now.state, "note": now.note}
    record |= {"iteration": now.iteration, "total": now.total}
    return record | {"gpu_hours": round(sum(status.gpu_hours for status in statuses), 2)}


def row_of(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """A record as a row of the table."""
    total = f"/{record['total']}" if record["total"] else ""
    path = Path(record["run"])
    return {
        "run": str(path.relative_to(folder)) if path != folder else path.name,
        "stage": record["stage"],
        "state": record["state"],
        "iteration": "" if record["iteration"] is None else f"{record['iteration']}{total}",
        "age": age_text(time.time() - record["begun"]),
        "last event": age_text(time.time() - record["last_event"]) + " ago",
        "size": size_text(record["size_bytes"]),
    }


def age_text(seconds: float) -> str:
    """A span of time in one unit. Example: 3.5 h."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def size_text(num_bytes: int) -> str:
    """Bytes in one decimal unit. Example: 1.2 GB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes} B"
