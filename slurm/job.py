"""What a Slurm job of the chain does on its first node: check the nodes, run the stage, go back to the queue."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit

from megatron_vcppo.config import Config
from megatron_vcppo.config.network import node_network
from megatron_vcppo.errors import DONE, SAVED, USER_ERROR, UserError
from megatron_vcppo.launch.attempts import run_stage
from megatron_vcppo.launch.notify import announce
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.launch.save_timing import save_clock
from megatron_vcppo.run import events
from megatron_vcppo.run.access import follow
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.events import process_age_s
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say, speaking_as
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.run.rollout_store import rollouts_folder
from megatron_vcppo.slurm.marked_lines import FINDING, marked
from megatron_vcppo.slurm.slurm_cli import ENDED, Unreadable, job_end_time, patiently, show_job, slurm, slurm_message
from megatron_vcppo.slurm.srun import STEP_ENVIRONMENT, job_config, probe_command, srun_processes, stage_nodes

PROBE_TIMEOUT_S = 120.0
LOST_TIMEOUT_S = 20.0
"""A node that does not answer this long after a failed attempt is lost."""
REQUEUE_TIMEOUT_S = 180.0
MAX_FUTILE_STARTS = 5
"""A job that was requeued this often in succession without leaving more than it found stays ended."""


@dataclass
class StageJob:
    """The callable that submitit pickles: it holds names only, so that a requeued job reads the run as it is then."""

    run: Path
    stage: str
    role_commands: RoleCommands

    def __call__(self) -> None:
        """Run the stage. Leaves with the trainer's exit code if that is not 0: it is the job's."""
        with speaking_as("controller"):
            code = self.run_and_announce()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the interpreter's end would make it deadly again
        if code:
            sys.exit(code)

    def run_and_announce(self) -> int:
        """The stage, its end told to whom run.notify names; returns its exit code."""
        try:
            with RunFolder(self.run).storage_errors_named():
                code = self.run_here()
        except UserError as error:
            say(f"error: {error}")
            with suppress(OSError):  # the disk may be full
                events.append(self.run, "refused", stage=self.stage, job=job_id(), cause=str(error))
            code = USER_ERROR
        with suppress(UserError):
            run, config = open_run(self.run)
            announce(run, config, self.stage, code)
        return code

    def run_here(self) -> int:
        """The stage in this allocation; returns its exit code."""
        signals = note_signals()
        run, config = open_run(self.run)
        follow(config.run.access)
        config = job_config(config, self.stage)
        hosts = submitit.JobEnvironment().hostnames
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        start = {"nodes": hosts, "restarts": restarts, "progress": progress(run, config, self.stage)}
        start |= {"age_s": round(process_age_s(), 2), "gpus": len(hosts) * config.cluster.gpus_per_node}
        code = Path(__file__).parents[2].name
        events.append(self.run, "job", stage=self.stage, job=job_id(), code=code, **start)
        say(f"{self.stage}: job {job_id()} on {', '.join(hosts)}, start {restarts + 1}")
        if run.stage(self.stage).is_done():
            say(f"{self.stage}: done before")
            return DONE
        assert len(hosts) == stage_nodes(config, self.stage), (hosts, self.stage)
        try:
            probe(run, config, self.role_commands, hosts, PROBE_TIMEOUT_S)
        except NodeLost as error:
            say(f"a node does not answer: {error}")
            return requeue(run, config, self.stage)
        address, end_time = node_network(config.cluster).address, job_end_time(job_id())
        due = save_clock(run, self.stage, end_time, config.cluster.save_margin_s)
        outcome = run_stage(
            run,
            config,
            self.stage,
            lambda logs: srun_processes(
                run=run,
                config=config,
                stage=self.stage,
                role_commands=self.role_commands,
                hosts=hosts,
                address=address,
                port=free_port(address),
                logs=logs,
            ),
            save_requested=lambda: signals["save"] or signals["end"] or due(),
            node_lost=lambda: lost_nodes(run, config, self.role_commands, hosts),
            end_time=end_time,
        )
        if outcome.code == DONE:
            events.append(self.run, "stage_done", stage=self.stage, job=job_id())
            say(f"{self.stage}: done")
        elif not signals["end"] and outcome.code != USER_ERROR:
            cut_short = signals["save"] or due()  # asked to save, but killed or too slow: the checkpoint before counts
            if outcome.code == SAVED or outcome.node_lost or cut_short:
                return requeue(run, config, self.stage)
        return outcome.code


class NodeLost(Exception):
    """A node of the allocation does not answer."""


def job_id() -> str:
    """The id of this job."""
    return os.environ["SLURM_JOB_ID"]


def note_signals() -> dict[str, bool]:
    """Take USR2 (save and requeue) and TERM (save; Slurm itself ends or requeues the job) in place of submitit."""
    signals = {"save": False, "end": False}

    def note(number: int, _: FrameType | None) -> None:
        signals["save" if number == signal.SIGUSR2 else "end"] = True

    signal.signal(signal.SIGUSR2, note)
    signal.signal(signal.SIGTERM, note)
    return signals


def probe(run: RunFolder, config: Config, role_commands: RoleCommands, hosts: list[str], timeout_s: float) -> None:
    """UserError naming the first node that does not see the run folder or lacks the Python environment.

    NodeLost if the nodes do not all answer in time.
    """
    argv = probe_command(config, run, role_commands, hosts)
    try:
        env = {name: value for name, value in (os.environ | STEP_ENVIRONMENT).items() if value}
        done = subprocess.run(
            argv,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise NodeLost(f"no answer from all of {', '.join(hosts)} in {timeout_s:.0f} s") from None
    if found := marked(done.stdout, FINDING):
        raise UserError(found[0])
    if "execve" in done.stderr:  # the node answers, but there is no shell where PATH points
        raise UserError(f"{slurm_message(done.stderr)}: does the job's environment have a PATH? see cluster.setup")
    if done.returncode:
        raise NodeLost(slurm_message(done.stderr) or f"a test step left with exit code {done.returncode}")


def lost_nodes(run: RunFolder, config: Config, role_commands: RoleCommands, hosts: list[str]) -> bool:
    """True if the allocation's nodes no longer all answer: then the job needs others.

    Without Slurm's controller no step starts anywhere: it is waited for first.
    """
    with suppress(UserError):
        patiently(lambda: show_job(job_id()))
    try:
        probe(run, config, role_commands, hosts, LOST_TIMEOUT_S)
    except (NodeLost, UserError) as error:
        say(f"a node is lost: {error}")
        return True
    return False


def progress(run: RunFolder, config: Config, stage: str) -> list[int]:
    """How far a stage is: checkpoints, optimizer steps within an iteration, stored responses."""
    return run.stage(stage).progress(rollouts_folder(config, stage))


def futile_starts(run: RunFolder, config: Config, stage: str) -> int:
    """Starts of this stage's job in succession, up to now, that found the stage as far as it is now."""
    begun = [event.get("progress") for event in events.of_stage(run.path, "job", stage)]
    now = progress(run, config, stage)
    count = 0
    while count < len(begun) and begun[-1 - count] == now:
        count += 1
    return count


def requeue(run: RunFolder, config: Config, stage: str) -> int:
    """Put this job back into the queue under its id, and wait for Slurm to end this start of it.

    Returns the exit code for the case that it could not be requeued.
    """
    if futile_starts(run, config, stage) >= MAX_FUTILE_STARTS:
        say(
            f"{stage}: {MAX_FUTILE_STARTS} starts left no new checkpoint, optimizer step or response: not requeued; "
            "is the time limit too short?"
        )
        events.append(run.path, "gave_up", stage=stage, job=job_id())
        return SAVED
    try:
        state = ""
        with suppress(Unreadable):
            state = (patiently(lambda: show_job(job_id())) or {}).get("JobState", "")
        if state in ("COMPLETING", "PENDING", *ENDED):
            # cancelled, or Slurm requeues it or, restarted from an older state, has it in the queue still
            say(f"{stage}: Slurm has ended this start of the job ({state}): not requeued from here")
            return SAVED
        events.append(
            run.path, "requeue", stage=stage, job=job_id(), checkpoint=run.stage(stage).checkpoint_iteration()
        )
        say(f"{stage}: back into the queue")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        patiently(lambda: slurm("scontrol", "requeue", job_id()))
    except UserError as error:
        say(f"{stage}: could not be requeued ({error}); continue with: vcppo resume {run.path}")
        return SAVED
    time.sleep(REQUEUE_TIMEOUT_S)
    return SAVED
