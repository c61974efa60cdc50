"""What Slurm says about jobs: squeue for live ones, sacct or, where there is no accounting, scontrol for ended ones."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.controller import UNREACHABLE
from megatron_vcppo.slurm.marked_lines import ANSWER, marked

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)
"""All others are queued, running or between the two; there are many of those, such as SIGNALING."""
TIMEOUT_S = 30.0
MAX_IDS = 1000
"""Of jobs, in one call: an argument has at most 128 KiB."""
Answer = TypeVar("Answer")
UNKNOWN_JOB = "Invalid job id"
"""Message of squeue and scontrol: Slurm has forgotten the job."""
NO_SUCH_NODES = "Requested node configuration is not available"
SQUEUE_FORMAT = f"{ANSWER}%i|%T|%r|%N|%S"
SACCT_FIELDS = "JobIDRaw,State,Reason,NodeList,Start"
STATE_NAME = re.compile("[A-Z_]+")
"""Slurm's long name of a state; "RESIZING+" and "CANCELLED by 0" lose their tails."""


OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SUBMITIT_")
"""Variables that Slurm's commands take for options, or that belong to the job in which a command was called."""
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")
"""Of these, the ones that say where the cluster is; they stay."""
DEFAULTS = ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "WCKEY")
"""SBATCH_… that users set as their defaults: they stay where the script does not have the option."""


class Unreachable(UserError):
    """Slurm's controller does not answer."""


class Unreadable(UserError):
    """An answer of one of Slurm's commands without what was asked for."""


@dataclass(frozen=True)
class JobState:
    """One job. Example: ``JobState("17", "PENDING", "Dependency")``."""

    job_id: str
    state: str
    """Slurm's long name, without what follows it (CANCELLED by 0)."""
    reason: str = ""
    """Why it is pending, or how it ended."""
    nodes: str = ""
    start: str = ""
    """When it started, or is expected to; some other word if Slurm does not know."""

    @property
    def expected_start(self) -> str | None:
        """When Slurm expects to start a job that waits, as an ISO time of this machine's time zone; None: not known."""
        try:
            return datetime.fromisoformat(self.start).isoformat()
        except ValueError:
            return None

    @property
    def active(self) -> bool:
        """Queued, running, or between the two."""
        return self.state not in ENDED


def slurm(*argv: str, accept: str | None = None) -> str:
    """Run one of Slurm's commands; returns its output, "" where its complaint contains ``accept``.

    UserError with Slurm's own message; Unreachable if its controller does not answer.
    """
    if shutil.which(argv[0]) is None:
        raise UserError(f"{argv[0]} is not on the path: run this where Slurm's commands are, as on a login node")
    try:
        env = command_environment(os.environ)
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{argv[0]} gave no answer in {TIMEOUT_S:.0f} s: is Slurm's controller up?") from None
    if not done.returncode:
        return done.stdout
    if accept is not None and accept in done.stderr:
        return ""
    error = Unreachable if any(words in done.stderr for words in UNREACHABLE) else UserError
    raise error(f"{argv[0]}: {slurm_message(done.stderr) or f'exit code {done.returncode}'}")


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables that change what Slurm's commands do or print, but for a user's defaults."""
    kept = {*OF_THE_SITE, *(f"SBATCH_{name}" for name in DEFAULTS)}
    return {name: value for name, value in environment.items() if name in kept or not name.startswith(OF_JOBS)}


def user_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """The options that a user's SBATCH_… set for jobs, by long name: srun does not read these variables."""
    return {name.lower(): value for name in DEFAULTS if (value := environment.get(f"SBATCH_{name}"))}


@contextmanager
def site_environment(script: str) -> Iterator[None]:
    """For a submission: this process's environment, which sbatch reads and hands to the job, without what is left over
    of another job, and without SBATCH_… that would override an option of ``script``."""
    before = dict(os.environ)
    kept = command_environment(before)
    for name in DEFAULTS:
        if f"#SBATCH --{name.lower()}=" in script:
            kept.pop(f"SBATCH_{name}", None)
    os.environ.clear()
    os.environ.update(kept)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def commands_folder() -> str:
    """Where Slurm's commands are on this machine, for a job that does not find them."""
    return str(Path(shutil.which("srun") or "/usr/bin/srun").parent)


def patiently(ask: Callable[[], Answer], seconds: float = 120.0) -> Answer:
    """Ask again while Slurm's controller does not answer, as while it restarts; Unreachable after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except Unreachable:
            if time.monotonic() > end:
                raise
            time.sleep(2)


def slurm_message(stderr: str) -> str:
    """Slurm's own words in one line, without the program's name before each."""
    lines = [line.split(": ", 2)[-1] if ": error: " in line else line for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines)


def job_states(job_ids: list[str]) -> dict[str, JobState]:
    """The state of each job that Slurm still knows. Unreachable if Slurm's controller does not answer."""
    if len(job_ids) > MAX_IDS:
        return job_states(job_ids[:MAX_IDS]) | job_states(job_ids[MAX_IDS:])
    if not job_ids:
        return {}
    listed = slurm("squeue", "-h", "-t", "all", "-j", ",".join(job_ids), "-o", SQUEUE_FORMAT, accept=UNKNOWN_JOB)
    found = parse_table(marked(listed, ANSWER), job_ids)
    unknown = [job for job in job_ids if job not in found]
    if unknown:
        with suppress(UserError):  # no accounting, or its data base is down
            listed = slurm("sacct", "-X", "-n", "-P", "-j", ",".join(unknown), "-o", SACCT_FIELDS)
            found |= parse_table(listed.splitlines(), unknown)
    for job in unknown:
        if job not in found and (record := show_job(job)):
            found[job] = JobState(
                job_id=job,
                state=record["JobState"],
                reason=record.get("Reason", ""),
                nodes=record.get("NodeList", ""),
                start=record.get("StartTime", ""),
            )
    return found


def parse_table(lines: Iterable[str], job_ids: Collection[str]) -> dict[str, JobState]:
    """The lines id|state|reason|nodes|start of these jobs; lines of another form are a wrapper's, not Slurm's."""
    states = {}
    for line in lines:
        job, *values = (value.strip() for value in line.split("|"))
        if job in job_ids and len(values) == 4 and (name := STATE_NAME.match(values[0])):
            states[job] = JobState(job, name[0], *values[1:])
    return states


def first_node(nodes: str) -> str:
    """The first of a list of nodes as Slurm writes it: "gpu[003-005,9],big1" -> "gpu003"."""
    head, bracket, tail = nodes.partition("[")
    return head + re.split(r"[-,\]]", tail)[0] if bracket and "," not in head else nodes.split(",")[0]


def show_job(job_id: str) -> dict[str, str] | None:
    """The record of ``scontrol show job``; None once Slurm has forgotten the job. Unreadable if it has no state."""
    text = slurm("scontrol", "-o", "show", "job", job_id, accept=UNKNOWN_JOB)
    if not text:
        return None
    line = re.search(rf"\bJobId={re.escape(job_id)}\s.*", text)  # a wrapper's words may stand before it
    record = dict(field.split("=", 1) for field in line[0].split() if "=" in field) if line else {}
    if "JobState" not in record:
        raise unreadable(f"scontrol show job {job_id}", text)
    return record


def unreadable(command: str, answer: str) -> Unreadable:
    """The error for an answer that lacks what was asked."""
    begin = " ".join(answer.split())[:100]
    return Unreadable(
        f"{command}: the answer has no line of the requested form{begin and f', it begins with {begin!r}'}: does a "
        "wrapper of Slurm's commands come first on the path?"
    )


def job_end_time(job_id: str) -> float:
    """When the job's time limit ends it, seconds since the epoch by this machine's clock; infinity if it has none, or
    Slurm does not say."""
    record: dict[str, str] | None = None
    with suppress(Unreachable, Unreadable):
        record = patiently(lambda: show_job(job_id))
    try:
        return time.time() + seconds_left(record or {}, controller_time())
    except (KeyError, ValueError):
        return float("inf")


def seconds_left(record: Mapping[str, str], now: datetime) -> float:
    """Until the end of a job by its record, of ``scontrol show job``. KeyError, ValueError if that does not say.

    now: by the clock of Slurm's controller. RunTime and squeue's time left go by the clock of whoever asks.
    """
    return (datetime.fromisoformat(record["EndTime"]) - now).total_seconds()


def controller_time() -> datetime:
    """By the clock of Slurm's controller, which may differ from this machine's; by this one's if it does not say."""
    with suppress(UserError, ValueError):
        text = patiently(lambda: slurm("scontrol", "show", "config"))
        if found := re.search(r"Configuration data as of (\S+)", text):
            return datetime.fromisoformat(found[1])
    return datetime.now()


def check_slurm_installed() -> None:
    """UserError if Slurm's commands are not here."""
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not on the path: submit from a login node, or use --cluster local")


def some_nodes_are_out() -> bool:
    """Whether nodes are down or drained just now, or not heard of since slurmctld started, of any partition."""
    try:
        answer = slurm("sinfo", "-h", "-N", "-t", "down,drain,unk", "-o", f"{ANSWER}%N")
        return bool(marked(answer, ANSWER))
    except UserError:
        return False


def check_scripts(requests: Iterable[tuple[str, str]], folder: Path) -> None:
    """Let Slurm judge each different batch script without queueing it; its own message is the error.

    requests: (script, what it requests, as text).
    """
    for script, request in dict.fromkeys(requests):
        path = folder / "test_only.sh"
        path.write_text(script, encoding="utf-8")
        try:
            with site_environment(script):
                slurm("sbatch", "--test-only", str(path))
        except Unreachable:
            raise
        except UserError as error:
            if NO_SUCH_NODES in str(error) and some_nodes_are_out():
                continue  # the test knows only nodes that are up; sbatch itself queues the job for the others, too
            reason = str(error).removeprefix("sbatch: ")
            raise UserError(f"Slurm refuses the job: {reason}; {request} (the keys cluster.*)") from None
        finally:
            path.unlink()
