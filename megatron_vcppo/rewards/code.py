"""Programs: run against tests in a process of their own with limits on time, memory, files and processes.

The limits keep accidents (endless loops, memory, fork bombs) from hurting a run; they are no sandbox against malice.
The answer is JSON: {"inputs": […], "outputs": […]} compares what the program prints for each input; {"asserts": […]}
runs the statements after the program.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.base import CORRECT, NO_ANSWER, Verdict, after_thinking, wrong

_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class CodeVerifier:
    """Runs the last code block behind the thinking; the first failing test ends it."""

    time_limit_s: float = 8.0
    """For all tests together, below the scorer's own limit."""
    memory_bytes: int = 2 << 30

    def __call__(self, prompt: Prompt, response_text: str) -> Verdict:
        """Correct if every test passes. Raises ValueError if the prompt's answer holds no tests."""
        blocks = _BLOCK.findall(after_thinking(response_text))
        if not blocks:
            return NO_ANSWER
        deadline = time.monotonic() + self.time_limit_s
        for number, (program, text, expected) in enumerate(_tests(prompt, blocks[-1]), start=1):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return wrong(f"test {number}: time limit")
            problem = self._run(program, text, expected, remaining)
            if problem:
                return wrong(f"test {number}: {problem}")
        return CORRECT

    def _run(self, program: str, text: str, expected: str | None, time_limit_s: float) -> str:
        """Run once; "" if it exits with 0 and prints what is expected (None: anything), else what went wrong."""
        # Input and output are files: the limit on file size then bounds what a program can print.
        with (
            tempfile.TemporaryDirectory(prefix="vcppo_code_") as folder,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as printed,
        ):
            given.write(text.encode())
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program],
                stdin=given,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
                preexec_fn=lambda: _limit(time_limit_s, self.memory_bytes),
                process_group=0,
            )
            try:
                process.wait(time_limit_s)
            except subprocess.TimeoutExpired:
                return "time limit"
            finally:
                _kill_group(process)
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        if process.returncode:
            return f"exit code {process.returncode}"
        return "" if expected is None or _same_output(output, expected) else "wrong output"


def _tests(prompt: Prompt, code: str) -> list[tuple[str, str, str | None]]:
    """(program, standard input, expected output or None) for each test."""
    answer: Any = json.loads(prompt.answer)
    if isinstance(answer, dict) and answer.get("asserts"):
        asserts = answer["asserts"] if isinstance(answer["asserts"], list) else [answer["asserts"]]
        return [("\n".join([code, *asserts]), "", None)]
    if isinstance(answer, dict) and answer.get("inputs") and len(answer["inputs"]) == len(answer.get("outputs", [])):
        return [(code, text, expected) for text, expected in zip(answer["inputs"], answer["outputs"], strict=True)]
    raise ValueError(f"{prompt.prompt_id}: a code answer must be JSON with asserts, or with inputs and outputs")


def _limit(time_limit_s: float, memory_bytes: int) -> None:
    """In the child, before the program: what it may use. The alarm outlives exec and ends it if its parent dies."""
    seconds = int(time_limit_s) + 1
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    signal.alarm(seconds + 1)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End the program and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _same_output(output: str, expected: str) -> bool:
    """Equal line by line, but for blanks at line ends and blank lines at the end."""
    return [line.rstrip() for line in output.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]
