"""Programs of the model: what starting a sandbox costs, and what judging one program costs in it."""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.code import CodeVerifier
from megatron_vcppo.rewards.sandbox.isolation import NONE, strongest_first
from megatron_vcppo.rewards.sandbox.isolation_choice import choose
from megatron_vcppo.rewards.sandbox.sandbox import Sandbox
from tools.benchmarks._measure import time_together

PRINTS = "print(sum(map(int, input().split())))"
RETURNS = "def f(x):\n    return x * x"
ANSWERS: dict[str, tuple[str, Any]] = {
    "1 test of output": (PRINTS, {"inputs": ["1 2"], "outputs": ["3"]}),
    "10 tests of output": (PRINTS, {"inputs": ["1 2"] * 10, "outputs": ["3"] * 10}),
    "10 calls": (RETURNS, {"fn_name": "f", "inputs": [[2]] * 10, "outputs": [4] * 10}),
    "10 asserts": (RETURNS, {"asserts": ["assert f(2) == 4"] * 10}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=20)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for the start and for each kind of tests, under every isolation that works here."""
    for isolation in (*strongest_first(), NONE):
        try:
            choose(isolation)
        except UserError as error:
            yield {"case": "start", "isolation": isolation, "problem": str(error)}
            continue
        started = time.perf_counter()
        with Sandbox(isolation) as sandbox:
            sandbox.script("", "", 60.0)
            yield {"case": "start", "isolation": isolation, "ms": round(1e3 * (time.perf_counter() - started), 1)}
        verifier = CodeVerifier(60.0, isolation=isolation)
        functions = {name: partial(_judge, verifier, *parts) for name, parts in ANSWERS.items()}
        for name, timing in time_together(functions, args.repeats).items():
            yield {"case": name, "isolation": isolation, **timing}
        verifier.close()


def _judge(verifier: CodeVerifier, program: str, answer: Any) -> None:
    prompt = Prompt("p:1", (1,), "", json.dumps(answer), "code")
    verdict = verifier(prompt, f"```python\n{program}\n```")
    assert verdict.reward == 1.0, verdict
