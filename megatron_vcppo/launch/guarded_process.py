"""A process under its guard (guard.py), as its controller sees it: executed, or forked from a preloaded one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_vcppo.errors import SIGNALLED
from megatron_vcppo.launch.guard import GUARD_ARGUMENTS


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
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                (sys.executable, *GUARD_ARGUMENTS, *command),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """See GuardedProcess."""
        return self.process.poll()

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
