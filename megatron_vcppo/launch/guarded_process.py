"""A process under its guard (guard.py), as its controller sees it: executed, or forked from a preloaded one.

A guard that is killed cannot kill its descendants: who started it adopts them and does that. What remains is a guard
and its starter killed at the same moment: then descendants that detached themselves go to init (on Slurm, slurmstepd
ends them with the step).
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_vcppo.errors import SIGNALLED
from megatron_vcppo.launch.guard import GUARD_ARGUMENTS, PR_SET_CHILD_SUBREAPER, descendants

GUARD_VARIABLE = "VCPPO_GUARD"
"""Set in the environment of a guard, and so of its descendants: whose they are."""
KILL_S = 10.0
"""How long killed processes may take to be gone."""


def adopting(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment for a new guard, and its mark; this process adopts what is left if the guard is killed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    mark = uuid.uuid4().hex
    return {**environment, GUARD_VARIABLE: mark}, mark


def kill_adopted(mark: str, session: int) -> None:
    """Kill and reap what a killed guard left to this process; no other guard's descendants.

    session: the guard's. It tells which zombies are its own, as they have no environment.
    """
    end, left = time.monotonic() + KILL_S, set[int]()
    while time.monotonic() < end:
        left = {pid for pid in descendants(os.getpid()) if pid in left or _is_of(pid, mark, session)}
        if not left:
            return
        left |= {below for pid in left for below in descendants(pid)}
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):  # not adopted yet: its parent has just been killed
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _is_of(pid: int, mark: str, session: int) -> bool:
    with contextlib.suppress(OSError):
        if os.getsid(pid) == session:
            return True
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return f"{GUARD_VARIABLE}={mark}".encode() in environment.read().split(b"\0")
    return False


class GuardedProcess(Protocol):
    """What a controller does with a process; its guard sees to it that nothing of it is left."""

    def poll(self) -> int | None:
        """The exit code, 128 + n or -n after signal n; None while it runs."""

    def send_signal(self, number: int) -> None:
        """To the process; no-op if it has ended."""

    def release(self) -> None:
        """The guard kills the process and all that is below it, and ends."""

    def kill(self) -> None:
        """End the guard itself, if it does not do that."""


class Executed:
    """A program, started by its guard."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, pass_fds: tuple[int, ...] = ()
    ) -> None:
        """It writes to log (appended) and leads a session."""
        marked, self.mark = adopting(environment)
        self.cleared = False
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                (sys.executable, *GUARD_ARGUMENTS, *command),
                env=marked,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """See GuardedProcess."""
        code = self.process.poll()
        if code is not None and code < 0 and not self.cleared:
            self.cleared = True
            kill_adopted(self.mark, self.process.pid)
        return code

    def send_signal(self, number: int) -> None:
        """See GuardedProcess."""
        self.process.send_signal(number)

    def release(self) -> None:
        """See GuardedProcess."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()

    def kill(self) -> None:
        """See GuardedProcess."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)
        self.poll()


class Forked:
    """Its guard was forked with it, and reports "pid N", then "code N", over the connection that is its input."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setblocking(False)
        self.guard_pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """See GuardedProcess; None, too, while it is still to be forked."""
        while self.returncode is None:
            try:
                report = self.connection.recv(64).decode()
            except BlockingIOError:
                return None
            except ConnectionError:  # reported once, where the guard had not read all; what it wrote comes next
                continue
            name, _, number = report.partition(" ")
            if name == "pid":
                self.guard_pid = int(number)
            else:
                self._end(int(number) if name == "code" else SIGNALLED + signal.SIGKILL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """See GuardedProcess; one that is still to be forked gets it then."""
        with contextlib.suppress(OSError):
            self.connection.send(bytes([number]))

    def release(self) -> None:
        """See GuardedProcess; one that is still to be forked counts as ended."""
        if self.poll() is None and self.guard_pid is None:
            self._end(SIGNALLED + signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """See GuardedProcess."""
        if self.poll() is None and self.guard_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.guard_pid, signal.SIGKILL)

    def _end(self, code: int) -> None:
        self.returncode = code
        self.connection.close()
