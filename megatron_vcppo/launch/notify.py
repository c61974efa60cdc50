"""Tells the user how a chain ended, by a command of their own (run.notify)."""

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import DONE, SAVED, SIGNALLED, UserError
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import printable, say

COMMAND_TIMEOUT_S = 60.0
POLL_S = 0.1
READ_BYTES = 1 << 16
MAX_CAUSE = 2000
"""Characters."""


def ending(run: RunFolder, config: Config, stage: str, code: int) -> tuple[str, str] | None:
    """(done | failed | stuck, the cause in one line) after a stage left with this exit code; None if nothing ended.

    done: every stage of the chain is. stuck: the job is not requeued any more, because its starts left nothing new. A
    stage that saved on request, or that Ctrl-C stopped, is no ending.
    """
    if code == DONE:
        try:
            finished = all(run.stage(name).is_done(checksums=False) for name in config.stages)
        except UserError:  # vcppo status names the damage
            return None
        return ("done", "every stage of the chain is done") if finished else None
    mine = [event for event in events.read(run.path) if event.get("stage") == stage]
    if code == SAVED:
        gave_up = bool(mine) and mine[-1]["event"] == "gave_up"
        return ("stuck", "its starts left no new checkpoint, optimizer step or response") if gave_up else None
    if code == SIGNALLED + signal.SIGINT:
        return None
    last: dict[str, Any] = next((event for event in reversed(mine) if event["event"] in ("attempt_end", "refused")), {})
    return "failed", " ".join(str(last.get("cause", f"exit code {code}")).split())


def announce(run: RunFolder, config: Config, stage: str, code: int) -> None:
    """Run the command of run.notify if something ended. What goes wrong with it is printed and changes nothing else."""
    if config.run.notify is None or (found := ending(run, config, stage, code)) is None:
        return
    event, cause = found
    cause = printable(cause)[:MAX_CAUSE]  # what goes into a variable holds no NUL and has a limit
    env = {"VCPPO_EVENT": event, "VCPPO_RUN": str(run.path), "VCPPO_STAGE": stage, "VCPPO_CAUSE": cause}
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", config.run.notify],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        say(f"warning: run.notify: could not be started: {error.strerror}")
        return
    output = _last_output(process, time.monotonic() + COMMAND_TIMEOUT_S)
    if output is None:
        with suppress(ProcessLookupError):  # it has left, and what still writes has detached itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        say(f"warning: run.notify: did not end in {COMMAND_TIMEOUT_S:.0f} s")
    elif process.returncode:
        said = output.decode(errors="replace").strip().splitlines()[-1:]
        say(f"warning: run.notify: exit code {process.returncode}{': ' if said else ''}{''.join(said)}")


def _last_output(process: "subprocess.Popen[bytes]", end: float) -> bytes | None:
    """The end of what it printed, once it has left; None if it has not at ``end`` (monotonic, seconds).

    No more is kept, however much it prints, and what it started in the background is not waited for.
    """
    assert process.stdout is not None
    output = b""
    with process.stdout as pipe:
        while True:
            left = process.poll() is not None
            readable = select.select([pipe], [], [], 0 if left else POLL_S)[0]
            chunk = os.read(pipe.fileno(), READ_BYTES) if readable else b""
            output = (output + chunk)[-READ_BYTES:]
            if left and not chunk:
                return output
            if time.monotonic() > end:
                return None
            if readable and not chunk:  # it has closed its output and works on
                time.sleep(POLL_S)
