"""The first process of a sandbox: it starts one process for each program, waits for it, and never reads what it ran.

Jobs and results are files in memory whose descriptors are passed on, so nothing of a test is in this process's memory,
of which programs inherit a copy. It answers a request only when all processes of it are gone.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_vcppo.rewards.sandbox.inside import assertions, kernel, landlock, namespaces, program, seccomp
from megatron_vcppo.rewards.sandbox.inside.scratch import empty, is_over

_JOB, _FOURTH, _FIFTH = 3, 4, 5  # descriptors in a program's process, behind the three standard ones
_OPEN_FILES = 64
_TICK_S = 0.1
Task = Callable[[], None]


def main(control: int, settings: dict[str, Any]) -> None:
    """Serve until the other side closes ``control``. In a program's process this returns when the program has ended.

    settings: ``isolation``; ``root``, the folder that this package is imported from; ``parent``, the process to end
    with (0: bubblewrap sees to that); ``readable``; ``scratch``, ``scratch_bytes``, ``scratch_files``; ``site``,
    folders that programs may import from; ``max_threads`` of the user, programs included.
    """
    if settings["parent"]:
        kernel.die_with_parent(settings["parent"])
    os.environ.update(HOME=settings["scratch"], TMPDIR=settings["scratch"])
    sys.path[:] = [path for path in sys.path if path not in ("", settings["root"])]
    names = program.preamble()
    if settings["isolation"] == "namespaces":
        limits = settings["scratch_bytes"], settings["scratch_files"]
        namespaces.enter(settings["parent"], settings["readable"], settings["scratch"], *limits)
    if settings["isolation"] != "none":
        kernel.drop_privileges()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no other process of this user may look into this one
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.chdir(settings["scratch"])
    sys.path += settings["site"]
    gc.freeze()  # programs end without touching, and so copying, what they share with this process
    if task := serve(socket.socket(fileno=control), settings, names):
        os._exit(_exit_code(task))


def _exit_code(task: Task) -> int:
    """Run it as the interpreter runs a script, but without taking the interpreter apart, which costs more than most
    programs do."""
    code = 0
    try:
        task()
    except SystemExit as error:
        code = error.code & 0xFF if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of a script does
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    return code


def serve(control: socket.socket, settings: dict[str, Any], names: dict[str, Any]) -> Task | None:
    """Answer requests until the other side is gone; returns, in a new process only, what that has to do.

    A request is JSON with ``kind``, ``time_limit_s``, ``memory_bytes`` and ``file_bytes``, and comes with descriptors:
    job, output and standard input of a ``script``; job and result of ``calls``; job, tests and result of ``tests``.
    """
    control.send(b"ready")
    while True:
        data, files, _, _ = socket.recv_fds(control, 1 << 16, 3)
        if not data:
            return None
        request = json.loads(data)
        empty(settings["scratch"])
        null = os.open("/dev/null", os.O_RDWR)
        ours, theirs = socket.socketpair()
        plans: list[tuple[list[int], Callable[[dict[str, Any]], None]]]
        if request["kind"] == "script":
            plans = [([files[2], files[1], null, files[0]], lambda job: program.run_script(job["program"], names))]
        elif request["kind"] == "calls":
            plans = [([null, null, null, *files], lambda job: program.run_calls(job, names, _FOURTH))]
        else:
            plans = [
                ([null, null, null, files[0], ours.fileno()],
                 lambda job: program.serve_tests(job, names, socket.socket(fileno=_FOURTH))),
                ([null, null, null, files[1], theirs.fileno(), files[2]],
                 lambda job: assertions.run(job, names, socket.socket(fileno=_FOURTH), _FIFTH)),
            ]  # fmt: skip
        children, init = [], os.getpid()
        for descriptors, work in plans:
            child = os.fork()
            if child == 0:
                for connection in (control, ours, theirs):
                    connection.detach()
                kernel.die_with_parent(init)
                _give_up_everything_else(descriptors, request, settings)
                return functools.partial(work, _read_job())
            children.append(child)
        for descriptor in (null, *files):
            os.close(descriptor)
        ours.close()
        theirs.close()
        control.send(json.dumps(_wait(children[-1], request["time_limit_s"], settings)).encode())


def _give_up_everything_else(descriptors: list[int], request: dict[str, Any], settings: dict[str, Any]) -> None:
    """In a new process: keep these descriptors, as 0, 1, …, and the rights of a program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in descriptors]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    os.closerange(len(high), 1 << 20)
    seconds = math.ceil(request["time_limit_s"]) + 1  # of one thread never before the deadline
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_DATA, request["memory_bytes"]),  # of the verifier process is another one
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, settings["max_threads"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    if settings["isolation"] == "landlock":
        devices = [f"/dev/{name}" for name in namespaces.DEVICES]
        landlock.restrict(settings["readable"], [settings["scratch"], *devices])
    # Without isolation the filter is a courtesy: where the kernel has it, nothing outlives its program.
    with contextlib.suppress(OSError) if settings["isolation"] == "none" else contextlib.nullcontext():
        seccomp.restrict()


def _read_job() -> dict[str, Any]:
    with os.fdopen(_JOB, "rb") as file:
        return json.load(file)


def _wait(deciding: int, time_limit_s: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Until that child has ended, in time; then all others are ended. ``exit``: its code; ``limit``: what it broke."""
    deadline = time.monotonic() + time_limit_s
    status, limit = None, ""
    while status is None and not limit:
        remaining = deadline - time.monotonic()
        signal.sigtimedwait({signal.SIGCHLD}, min(max(remaining, 0), _TICK_S))
        pid, found, usage = os.wait4(deciding, os.WNOHANG)
        if pid:
            status = found
            # The limit of processor time may come before this look, and with several threads before the deadline.
            out_of_time = time.monotonic() >= deadline or usage.ru_utime + usage.ru_stime >= time_limit_s
            if os.WIFSIGNALED(found) and out_of_time:
                limit = "time limit"
        elif remaining <= 0:
            limit = "time limit"
        elif is_over(settings["scratch"], settings["scratch_bytes"], settings["scratch_files"]):
            limit = "file limit"
    _end_all()
    return {"exit": os.waitstatus_to_exitcode(status) if status is not None else 0, "limit": limit}


def _end_all() -> None:
    """Kill and bury what is left; what a killed process has started becomes this one's child, and is next."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, _TICK_S)


def _children() -> list[int]:
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
