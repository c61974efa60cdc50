"""Runs one stage to its end: attempts under the controller, verdict from the stage's manifest, a readable summary."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import DONE, FAILED, SAVED, USER_ERROR, UserError
from megatron_vcppo.launch import memory_kills
from megatron_vcppo.launch.controller import Outcome, RoleProcess, supervise
from megatron_vcppo.launch.save_timing import save_allowance_s
from megatron_vcppo.run import events
from megatron_vcppo.run.files import make_private_folder, move, remove
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.secret import make_secret

GONE_CHECK_S = 5.0


def clear_rendezvous(run: RunFolder, stage: str) -> Path:
    """A folder private to the user, without engines of an earlier attempt, and with a new secret."""
    folder = run.stage(stage).rendezvous
    remove(folder)
    make_private_folder(folder)
    make_secret(run.stage(stage).secret)
    return folder


def run_stage(
    run: RunFolder,
    config: Config,
    stage: str,
    layout: Callable[[Path], list[RoleProcess]],
    *,
    save_requested: Callable[[], bool],
    abort_requested: Callable[[], bool] = lambda: False,
    node_lost: Callable[[], bool] = lambda: False,
    end_time: float = float("inf"),
) -> Outcome:
    """Attempts until the stage is done, saved on request, or failed for good.

    end_time: when the job is ended, seconds since the epoch.
    ``layout`` gives the role processes of an attempt whose logs go to the given folder. An attempt whose processes were
    killed is followed by another from the newest checkpoint, at most ``cluster.crash_retries`` times in succession
    without a new checkpoint, and only while no node is lost.
    """

    def allowance_s() -> float:
        seconds = save_allowance_s(run, stage, config.run.timeout_s, end_time)
        events.append(run.path, "save_requested", stage=stage, seconds=round(seconds))
        return seconds

    is_gone = _gone_watch(run)
    futile = 0
    while True:
        reached = run.stage(stage).checkpoint_iteration()
        logs = run.stage(stage).next_attempt()
        clear_rendezvous(run, stage)
        events.append(run.path, "attempt", stage=stage, attempt=logs.name, checkpoint=reached)
        started, kills = time.time(), memory_kills.oom_kills()
        outcome = supervise(
            layout(logs.absolute()),
            logs,
            save_requested=save_requested,
            abort_requested=lambda: abort_requested() or is_gone(),
            save_allowance_s=allowance_s,
            follow_timeout_s=config.run.timeout_s,
            grace_s=config.cluster.stop_grace_s,
        )
        if run.is_gone():
            raise UserError(run.gone_text)
        for log in run.stage(stage).rendezvous.glob("*.log"):
            move(log, logs / log.name)
        outcome = memory_kills.named(judge(run, stage, outcome), config, stage, kills)
        events.append(
            run.path,
            "attempt_end",
            stage=stage,
            attempt=logs.name,
            code=outcome.code,
            cause=outcome.cause,
            details=outcome.details[-4:],
            seconds=round(time.time() - started, 1),
            leaving_s=outcome.leaving_s,
        )
        if outcome.code in (DONE, SAVED):
            return outcome
        say(failure_text(stage, logs, outcome))
        if outcome.code != USER_ERROR and not (save_requested() or abort_requested()) and node_lost():
            return replace(outcome, node_lost=True)
        gained = run.stage(stage).checkpoint_iteration()
        futile = 0 if gained != reached else futile + 1
        stopping = save_requested() or abort_requested()
        if not outcome.killed or stopping or futile > config.cluster.crash_retries:
            return outcome
        say(f"{stage}: starting again from " + ("the beginning" if gained is None else f"iteration {gained}"))


def _gone_watch(run: RunFolder) -> Callable[[], bool]:
    """Whether the run folder was renamed or removed: the ranks would write into a new folder of the old name."""
    checked, found = time.monotonic(), False

    def is_gone() -> bool:
        nonlocal checked, found
        if time.monotonic() - checked > GONE_CHECK_S:
            checked, found = time.monotonic(), run.is_gone()
        return found

    return is_gone


def judge(run: RunFolder, stage: str, outcome: Outcome) -> Outcome:
    """A trainer that left with 0 has done its stage only if the stage's manifest says so."""
    if outcome.code != DONE:
        return outcome
    try:
        if run.stage(stage).is_done(checksums=False):
            return outcome
    except UserError as error:
        return Outcome(FAILED, f"the trainer left with 0, but {str(error).splitlines()[0]}")
    return Outcome(FAILED, f"the trainer left with 0 but wrote no {run.stage(stage).manifest}")


def failure_text(stage: str, logs: Path, outcome: Outcome) -> str:
    """Who died first, the last lines of its log, and where the logs are."""
    lines = [f"{stage}: {outcome.cause}"]
    if outcome.details:
        lines += [f"  | {line}" for line in outcome.details]
    return "\n".join([*lines, f"  logs: {logs}"])
