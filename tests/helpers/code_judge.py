"""Judges programs in a process that may run as another user: tests of isolation mean little as root alone."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOBODY = 65534
_AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


class Judge:
    """A process with a CodeVerifier. ``user``: "me", or "nobody" for an ordinary user where the tests run as root."""

    def __init__(self, isolation: str, user: str = "me", memory_bytes: int = 1 << 29) -> None:
        prefix, python = ((*_AS_NOBODY,), nobody_python()) if user == "nobody" else ((), sys.executable)
        assert python
        settings = json.dumps({"isolation": isolation, "memory_bytes": memory_bytes})
        self._process = subprocess.Popen(
            [*prefix, python, str(Path(__file__)), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "SECRET": "in the air"},
        )
        self.pid = self._process.pid

    def __call__(self, program: str, answer: Any, time_limit_s: float = 10.0) -> str:
        """The verdict on a program."""
        return self.response(f"Here:\n```python\n{program}\n```\n", answer, time_limit_s)

    def response(self, text: str, answer: Any, time_limit_s: float = 10.0) -> str:
        """The verdict on a response."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([text, json.dumps(answer), time_limit_s]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the judge has died"
        return json.loads(line)

    def kill(self) -> None:
        """As the scorer does it: without warning."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end."""
        self._process.communicate(timeout=30)


@functools.cache
def nobody_python() -> str | None:
    """An interpreter that an ordinary user can start and that can read the package; None if there is none, or if
    the tests do not run as root."""
    if os.getuid():
        return None
    # setpriv itself may start what the user may not: the binary must be reachable without root's rights.
    check = (
        "import os, sys; assert sys.version_info >= (3, 11) and os.access(os.path.realpath(sys.executable), os.X_OK)\n"
        "import megatron_vcppo.rewards.code"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run([*_AS_NOBODY, python, "-c", check], env={"PYTHONPATH": str(ROOT)}, capture_output=True)
        if done.returncode == 0:
            return python
    return None


def main() -> None:
    """One JSON line in, one out."""
    sys.path.insert(0, str(ROOT))
    from megatron_vcppo.records import Prompt
    from megatron_vcppo.rewards.code import CodeVerifier

    settings = json.loads(sys.argv[1])
    verifiers: dict[float, CodeVerifier] = {}
    for line in sys.stdin:
        text, answer, time_limit_s = json.loads(line)
        if time_limit_s not in verifiers:
            verifiers[time_limit_s] = CodeVerifier(time_limit_s, settings["memory_bytes"], settings["isolation"])
        verdict = verifiers[time_limit_s](Prompt("p:1", (1,), "write it", answer, "code"), text)
        print(json.dumps(verdict.verdict), flush=True)


if __name__ == "__main__":
    main()
