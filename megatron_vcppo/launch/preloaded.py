"""A process that has imported what roles of a chain need, and from which they are forked (Linux, without GPUs).

Imports are most of a role's start: torch, Megatron-Core and transformers 7 s of processor time in each rank, vLLM 9 s
in each engine. A chain on this machine makes them once for all its ranks and once for all its engines. The process is
single-threaded and never computes, so its forks are whole processes. Libraries that read the environment when they are
imported read the right one: a role whose environment is another one, apart from its place among the ranks, gets another
process to be forked from.

What is forked has a guard (guard.py), as what is executed has, which is forked with it. Over the connection that is its
standard input, the guard reports its process id and then the exit code.

    controller ─┬─ guard ── preloaded ─┬─ guard ── rank 0
                │                      └─ guard ── rank 1
                └─ guard ── preloaded ─── guard ── rollout node ── engine
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vcppo.errors import DONE, FAILED
from megatron_vcppo.launch.guard import Guard, die_with_parent, kill_descendants
from megatron_vcppo.launch.guarded_process import Executed, Forked
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.processes import exit_code, leave, show_command
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", SECRET_FILE_VARIABLE)
"""What one rank's environment has and another's has not; no library reads it when it is imported."""
END_S = 30.0
IMPORT_TIMEOUT_S = 600.0
"""Of all imports together; then the process ends, and its log says where it was: a file system that does not answer."""
MESSAGE_BYTES = 65536


class Preloaded:
    """The controller's side: starts the process when the first role is to be forked, and again if it is gone."""

    def __init__(self, log: Path, python: str, modules: Sequence[str]) -> None:
        """log: of what is written while modules are imported (appended). python: the interpreter."""
        self.log, self.python, self.modules = log, python, tuple(modules)
        self._environment: dict[str, str] = {}
        self._process: Executed | None = None
        self._control: socket.socket | None = None

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end()

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Start importing for roles with this environment, unless that was done."""
        shared = {name: value for name, value in environment.items() if name not in PLACE}
        if self._process is not None and self._process.poll() is None and shared == self._environment:
            return
        self.end()
        self._environment = shared
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        options = ("--log", str(self.log), "--control", str(number), "--timeout-s", str(IMPORT_TIMEOUT_S))
        command = (self.python, "-m", __name__, *options, *self.modules)
        with theirs:
            self._process = Executed(command, shared, self.log, pass_fds=(number,))

    def fork(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """A role's process: ``command`` is PYTHON -m MODULE ARGUMENT…; it writes to log (appended)."""
        place = {name: environment[name] for name in PLACE if name in environment}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"command": command, "place": place, "requested_s": time.clock_gettime(time.CLOCK_BOOTTIME)}
        with theirs, log.open("ab") as output:
            self.prepare(environment)
            try:
                self._send(request, theirs.fileno(), output.fileno())
            except ConnectionError:  # it was killed, and its guard has not ended yet
                self.end()
                self.prepare(environment)
                self._send(request, theirs.fileno(), output.fileno())
        return Forked(ours)

    def _send(self, request: dict[str, Any], *descriptors: int) -> None:
        assert self._control is not None
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)

    def end(self) -> None:
        """End the process and whatever is left of what it forked."""
        if self._process is None or self._control is None:
            return
        self._control.close()
        self._process.release()
        end = time.monotonic() + END_S
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        self._process = self._control = None


def receive_jobs(control: socket.socket) -> tuple[list[str], dict[str, str]] | None:
    """Fork a guard and its rank for every request; returns in a rank: its command and place. None at the end."""
    while True:
        message, descriptors, *_ = socket.recv_fds(control, MESSAGE_BYTES, 2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            return None
        request = json.loads(message)
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        control.close()
        if become_guard(request["command"], request["place"], *descriptors):
            startup.begin_at(request["requested_s"])
            return request["command"], request["place"]


def become_guard(command: list[str], place: dict[str, str], connection: int, log: int) -> bool:
    """Guard a child of this process, in which this returns True; the guard itself ends here."""
    die_with_parent()
    os.setsid()
    for number, descriptor in ((0, connection), (1, log), (2, log)):
        os.dup2(descriptor, number)
    os.close(connection)
    os.close(log)
    guard = Guard()
    if guard.fork():
        show_command([*(f"RANK={rank}" for name, rank in place.items() if name == "RANK"), *command])
        return True
    show_command(["guard.py", *command])
    code = FAILED
    try:
        with socket.socket(fileno=os.dup(0)) as reports:
            reports.send(f"pid {os.getpid()}".encode())
            code = guard.watch()
            reports.send(f"code {code}".encode())
    except OSError:  # the controller is gone, or counts this process as ended
        kill_descendants()
    finally:
        os._exit(code)


def main() -> None:
    """Import, then fork ranks until the controller hangs up. In a rank: run its module."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vcppo.launch.preloaded", description=__doc__)
    parser.add_argument("--log", help="where this process writes; tells whose it is")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("modules", nargs="*")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.timeout_s, exit=True)
    for module in arguments.modules:
        with contextlib.suppress(Exception, SystemExit):  # the rank that needs it will report it, in its log
            importlib.import_module(module)
    faulthandler.cancel_dump_traceback_later()  # its thread ends, too: forks are whole processes
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()  # or every fork would write it again, into its own log
    gc.collect()
    gc.freeze()  # the collector would write to every object that it visits, and pages are shared as long as nobody does
    job = receive_jobs(socket.socket(fileno=arguments.control))
    if job is None:
        return
    (_, _, module, *words), place = job
    os.environ.update(place)
    sys.argv = [module, *words]
    code = FAILED
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = DONE
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    leave(code)


if __name__ == "__main__":
    main()
