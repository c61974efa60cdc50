"""Programs against tests: right, wrong, endless, greedy, crashing."""

import json
import time
from pathlib import Path

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.base import Verdict
from megatron_vcppo.rewards.code import CodeVerifier

SUM = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
ADD = "a, b = map(int, input().split())\nprint(a + b)  "


def judge(code: str, answer: dict, time_limit_s: float = 5.0, memory_bytes: int = 1 << 29) -> Verdict:
    prompt = Prompt("p:1", (1,), "write it", json.dumps(answer), "code")
    response = f"<think>```python\nprint('not this one')\n```</think>Here:\n```python\n{code}\n```\n"
    return CodeVerifier(time_limit_s, memory_bytes)(prompt, response)


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (ADD, "correct"),
        ("print(3)", "wrong: test 2: wrong output"),
        ("raise SystemExit(3)", "wrong: test 1: exit code 3"),
        ("x = bytearray(1 << 30)", "wrong: test 1: exit code 1"),
        ("while True: print('x' * 1000000)", "wrong: test 1: exit code 1"),
        ("open('/proc/self/fd/0'); print(3 if input() else 0)", "wrong: test 2: wrong output"),
        ("this is no program", "wrong: test 1: exit code 1"),
    ],
)
def test_programs_that_read_and_print(code: str, verdict: str) -> None:
    assert judge(code, SUM) == Verdict(1.0 if verdict == "correct" else -1.0, verdict)


def test_asserts() -> None:
    answer = {"asserts": ["assert f(2) == 4", "assert f(3) == 9"]}
    assert judge("def f(x):\n    return x * x", answer).verdict == "correct"
    assert judge("def f(x):\n    return x + x", answer).verdict == "wrong: test 1: exit code 1"


def test_endless_programs_end() -> None:
    started = time.monotonic()
    assert judge("while True: pass", SUM, time_limit_s=0.5).verdict == "wrong: test 1: time limit"
    # What the program started is ended with it.
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(61.25)\nprint(3)"
    assert judge(fork, {"inputs": [""], "outputs": ["3"]}).verdict == "correct"
    assert time.monotonic() - started < 20
    while [path for path in Path("/proc").glob("[0-9]*/cmdline") if "sleep(61.25)" in read(path)]:
        assert time.monotonic() - started < 30, "a process that the program started is left"
        time.sleep(0.05)


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_programs_see_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    code = "import os\nprint(sorted(os.environ))"
    assert judge(code, {"inputs": ["x"], "outputs": ["['HOME', 'LANG', 'PATH', 'TMPDIR']"]}).verdict == "correct"


def test_no_program_and_no_tests() -> None:
    prompt = Prompt("p:1", (1,), "write it", json.dumps(SUM), "code")
    assert CodeVerifier()(prompt, "no code").verdict == "no answer"
    assert CodeVerifier()(prompt, "```\nprint(1)").verdict == "no answer"
    for bad in ("{}", "[]", '{"inputs": ["1"], "outputs": []}', "nonsense"):
        with pytest.raises(ValueError):
            CodeVerifier()(Prompt("p:1", (1,), "", bad, "code"), f"```\n{ADD}\n```")
