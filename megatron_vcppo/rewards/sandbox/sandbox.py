"""A sandbox as its user sees it: programs go in, what they printed or returned comes out, all within a deadline."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.rewards.sandbox.inside.scratch import empty
from megatron_vcppo.rewards.sandbox.isolation import interpreter, launch

_PREFIX = "vcppo_code_"
_ENOUGH_BYTES = 256 << 20
_START_S = 60.0
_GRACE_S = 1.5
"""How much longer than a program's time limit its sandbox may take to report it, before it is ended."""
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    # Threads would reserve 64 MiB of address space each; numerical libraries would start one for every core.
    "MALLOC_ARENA_MAX": "2",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


class ScratchFolder:
    """Made private to this user, locked while it is in use; folders that killed processes have left are removed."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=_place())
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """With all in it."""
        with contextlib.suppress(OSError):  # what cannot be removed now is removed with the next one
            _remove(self.path)
        os.close(self._lock)


def _place() -> str:
    """Memory, if there is room: on a disk a program can make folders far faster than they can be removed."""
    memory = "/dev/shm"
    with contextlib.suppress(OSError):
        room = os.statvfs(memory)
        if os.access(memory, os.W_OK | os.X_OK) and room.f_bavail * room.f_frsize >= _ENOUGH_BYTES:
            return memory
    return tempfile.gettempdir()


def _remove_abandoned() -> None:
    for path in Path(_place()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner lives
                _remove(str(path))
            finally:
                os.close(descriptor)


def _remove(path: str) -> None:
    empty(path)
    os.rmdir(path)


class SandboxError(Exception):
    """The sandbox itself does not work; nothing is known about a program."""


@dataclass(frozen=True)
class Outcome:
    """How a program's process ended, and what it left."""

    exit_code: int
    """Negative: the signal that ended it."""
    limit: str
    """"time limit" or "file limit" if it was ended for that, else ""."""
    result: bytes
    """What it printed, or wrote as its result."""


class Sandbox:
    """Programs one after the other, each in a new process behind the same walls; started at the first one.

    Use it from one thread: the sandbox ends with that. Example: ``Sandbox("landlock").script("print(1)", "", 5.0)``.
    Methods raise SandboxError.
    """

    def __init__(self, isolation: str, memory_bytes: int = 2 << 30, python: str | None = None) -> None:
        self.isolation, self._memory_bytes, self._python = isolation, memory_bytes, python or interpreter()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._scratch: ScratchFolder | None = None

    def script(self, program: str, stdin: str, time_limit_s: float, max_output: int = 16 << 20) -> Outcome:
        """Run a program that reads standard input; ``result`` is what it printed. max_output: bytes of any file."""
        files = [{"program": program}, None, stdin.encode(errors="surrogatepass")]
        return self._run("script", files, 1, time_limit_s, max_output)

    def calls(
        self, program: str, fn_name: str, inputs: list[list[Any]], time_limit_s: float, max_output: int = 4 << 20
    ) -> Outcome:
        """Call one function for each list of arguments; ``result`` has a line of encoded data for each call."""
        job = {"program": program, "fn_name": fn_name, "inputs": inputs}
        return self._run("calls", [job, None], 1, time_limit_s, max_output)

    def tests(self, program: str, tests: list[str], setup: str, time_limit_s: float) -> str | None:
        """Run statements with asserts against a program, in another process; None if all pass, else what failed.

        setup: executed before the program, in its process.
        """
        nonce = secrets.token_hex(16)
        files = [{"program": program, "setup": setup}, {"tests": tests, "nonce": nonce}, None]
        outcome = self._run("tests", files, 2, time_limit_s, 1 << 20)
        try:
            verdict = json.loads(outcome.result)
            if verdict["nonce"] != nonce:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            return outcome.limit or "the tests did not come to their end"
        return None if verdict["failed"] is None else "test {}: {}".format(*verdict["failed"])

    def close(self) -> None:
        """End it and all in it."""
        if self._control:
            self._control.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._scratch:
            self._scratch.remove()
        self._process = self._control = self._scratch = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, kind: str, contents: list[Any], result: int, time_limit_s: float, file_bytes: int) -> Outcome:
        """contents: of the request's files, None an empty one; result: which of them the program writes."""
        control = self._control or self._start()
        request = {"kind": kind, "time_limit_s": time_limit_s, "memory_bytes": self._memory_bytes,
                   "file_bytes": file_bytes}  # fmt: skip
        files = [_memory_file(content) for content in contents]
        try:
            control.settimeout(time_limit_s + _GRACE_S)
            socket.send_fds(control, [json.dumps(request).encode()], files)
            reply = json.loads(control.recv(1 << 12))
            size = min(os.fstat(files[result]).st_size, file_bytes)
            return Outcome(int(reply["exit"]), str(reply["limit"]), os.pread(files[result], size, 0))
        except TimeoutError:
            self.close()
            return Outcome(0, "time limit", b"")
        except (OSError, ValueError) as error:
            self.close()
            raise SandboxError(f"the sandbox ({self.isolation}) has ended: {error}") from error
        finally:
            for file in files:
                os.close(file)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        complaints = os.memfd_create("vcppo_sandbox_stderr")
        try:
            self._scratch = ScratchFolder()
            start = launch(self.isolation, self._scratch.path, self._python)
            # The environment shows in /proc/1/environ, and a program may read it there: nothing of ours is in it.
            self._process = subprocess.Popen(
                start.command(self._python, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
            )
            theirs.close()
            ours.settimeout(_START_S)
            if ours.recv(16) != b"ready":
                raise OSError(_last_line(complaints))
        except OSError as error:
            ours.close()
            self.close()
            raise SandboxError(f"the sandbox ({self.isolation}) does not start: {error}") from error
        finally:
            theirs.close()
            os.close(complaints)
        self._control = ours
        return ours


def _memory_file(content: Any) -> int:
    """A file that only its descriptor leads to, at its start. content: bytes, None, or what becomes JSON."""
    data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
    descriptor = os.memfd_create("vcppo_job", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _last_line(descriptor: int) -> str:
    text = os.pread(descriptor, 1 << 16, 0).decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
