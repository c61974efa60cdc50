"""Programs: run in a sandbox against tests, and judged outside of it by what they print or return.

The program never sees what is expected. Printed text is compared here; results of calls come as plain data and are
compared here; asserts are executed in a process that the program cannot reach and sees only plain data of.
"""

import json
import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.code_compare import CHECKERS, Checker, output_limit
from megatron_vcppo.rewards.code_tests import AssertTests, CallTests, OutputTests, parse_tests
from megatron_vcppo.rewards.sandbox.inside import plain
from megatron_vcppo.rewards.sandbox.isolation_choice import AUTO, choose
from megatron_vcppo.rewards.sandbox.sandbox import Outcome, Sandbox
from megatron_vcppo.rewards.verifier import CORRECT, NO_ANSWER, Verdict, after_thinking, wrong

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^`]*)$")
_PYTHON = {"python", "python2", "python3", "py", "py3", "pypy", "pypy3", "cpython"}
_NO_VALUE = object()


@dataclass(frozen=True)
class Block:
    """A fenced block of Markdown."""

    language: str
    """The first word behind the fence, in lower case; "" if there is none."""
    text: str


def find_program(text: str) -> str | None:
    """The last block that is marked as Python, else the last without a language; None if there is neither.

    A block that is never closed is none: the response was not finished. Blocks may be indented, as in lists, and lines
    may end in CR LF. A fence of four or more characters holds shorter ones.
    """
    blocks = _blocks(text.replace("\r\n", "\n").replace("\r", "\n"))
    for wanted in (_PYTHON, {""}):
        if matching := [block.text for block in blocks if block.language in wanted]:
            return matching[-1]
    return None


def _blocks(text: str) -> list[Block]:
    blocks = []
    fence, language, lines = "", "", list[str]()
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not fence and match:
            fence, lines = match[1], []
            words = re.findall(r"[\w+#-]+", match[2])
            language = words[0].lower() if words else ""
        elif fence and match and match[1].startswith(fence) and not match[2].strip():
            blocks.append(Block(language, textwrap.dedent("\n".join(lines)) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    # Some models close the last block on the line of its last statement.
    if fence and lines and lines[-1].rstrip().endswith(fence):
        lines[-1] = lines[-1].rstrip().removesuffix(fence)
        blocks.append(Block(language, textwrap.dedent("\n".join(lines)) + "\n"))
    return blocks


class CodeVerifier:
    """Judges the program of a response; the first failing test ends it. Use it from one thread."""

    def __init__(
        self,
        time_limit_s: float = 8.0,
        memory_bytes: int = 2 << 30,
        isolation: str = AUTO,
        checkers: Mapping[str, Checker] | None = None,
    ) -> None:
        """time_limit_s: for all tests of a program together, below the scorer's own limit. checkers: in addition to the
        built-in ones.
        """
        self._isolation, self._time_limit_s, self._memory_bytes = isolation, time_limit_s, memory_bytes
        self._checkers = {**CHECKERS, **(checkers or {})}
        self._sandbox: Sandbox | None = None

    def __call__(self, prompt: Prompt, response_text: str) -> Verdict:
        """Correct if every test passes. Raises ValueError if the prompt's answer holds no tests."""
        tests = parse_tests(prompt.answer, self._checkers)
        program = find_program(after_thinking(response_text))
        if program is None:
            return NO_ANSWER
        self._sandbox = self._sandbox or Sandbox(self.choose_isolation(), self._memory_bytes)
        if isinstance(tests, OutputTests):
            problem = self._printed(program, tests)
        elif isinstance(tests, CallTests):
            problem = self._returned(program, tests)
        else:
            problem = self._asserted(program, tests)
        return wrong(problem) if problem else CORRECT

    def choose_isolation(self) -> str:
        """What programs are isolated by on this node. Raises UserError if nothing works that may be used."""
        return choose(self._isolation)

    def check_answer(self, answer: str) -> None:
        """Raises ValueError if an answer holds no tests, or malformed ones; for when data are read."""
        parse_tests(answer, self._checkers)

    def close(self) -> None:
        """End the sandbox; the next program starts another."""
        if self._sandbox:
            self._sandbox.close()
            self._sandbox = None

    def _printed(self, program: str, tests: OutputTests) -> str:
        assert self._sandbox
        checker = self._checkers[tests.checker]
        deadline = time.monotonic() + self._time_limit_s
        for number, (text, expected) in enumerate(zip(tests.inputs, tests.outputs), start=1):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return f"test {number}: time limit"
            outcome = self._sandbox.script(program, text, remaining, output_limit(expected))
            if problem := _process_problem(outcome):
                return f"test {number}: {problem}"
            if not checker(text, expected, outcome.result.decode(errors="replace")):
                return f"test {number}: wrong output"
        return ""

    def _returned(self, program: str, tests: CallTests) -> str:
        assert self._sandbox
        outcome = self._sandbox.calls(program, tests.fn_name, tests.inputs, self._time_limit_s)
        lines = outcome.result.split(b"\n")[:-1]
        for number, expected in enumerate(tests.outputs, start=1):
            if number > len(lines):
                return f"test {number}: {_process_problem(outcome) or 'no result'}"
            if not plain.same(_value(lines[number - 1]), expected):
                return f"test {number}: wrong result"
        return ""

    def _asserted(self, program: str, tests: AssertTests) -> str:
        assert self._sandbox
        return self._sandbox.tests(program, tests.statements, tests.setup, self._time_limit_s) or ""


def _value(line: bytes) -> Any:
    """What a program returned; an object that equals nothing if it is no plain data."""
    try:
        return plain.decode(json.loads(line), _no_reference)
    except (ValueError, RecursionError):
        return _NO_VALUE


def _no_reference(kind: str, content: Any) -> Any:
    raise ValueError(f"a value of the unknown kind {kind!r}")


def _process_problem(outcome: Outcome) -> str:
    return outcome.limit or (f"exit code {outcome.exit_code}" if outcome.exit_code else "")
