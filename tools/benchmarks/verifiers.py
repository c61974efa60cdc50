"""Verifiers of answers: milliseconds a pair for mathematics and multiple choice, warm, in one process."""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

from math_verify.parser import extract_latex, parse_latex_cached

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.algebra import read
from megatron_vcppo.rewards.choice import verify_choice
from megatron_vcppo.rewards.math_answer import verify_math
from megatron_vcppo.rewards.verifier import Verifier

_PAIRS = {
    "exact": [("42", "42.0"), (r"\frac{14}{4}", "3.5"), ("1/3", r"\frac{2}{6}"), ("-7", "7"), ("0.125", "1/8")],
    "numbers": [
        (r"1{,}234", "1234"), (r"\$5.00", "5"), (r"12\text{ cm}", "12"), (r"50\%", "50"), ("1 1/2", "1.5"),
        (r"0.\overline{3}", r"\frac13"), ("1/2^99", "1/2^98"), ("204_5", "204_{5}"), ("3:4", "6:8"),
    ],
    "expressions": [
        (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        (r"\sin 30^\circ", r"\frac12"), (r"\log_2 8", "3"), ("3+4i", "4i+3"), ("x = 5", "5"),
        (r"\frac{\pi}{4}", r"\pi/3"),
    ],
    "structures": [
        (r"(-\infty,-1)\cup(2,\infty)", r"x<-1 \text{ or } x>2"), (r"\{1,2,3\}", "3, 2, 1"),
        (r"(1, \frac12)", "(1, 0.5)"), (r"1\pm\sqrt5", r"1+\sqrt5, 1-\sqrt5"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&5\end{bmatrix}"),
        ("y=2x+1", "2x-y+1=0"), ("x=1 or x=2", r"\{1,2\}"),
    ],
}  # fmt: skip
_CHOICES = [
    (r"\boxed{\text{(B)}}", "B"),
    ("The answer is option B.", "B"),
    (r"\boxed{A, C}", "A"),
    ("Answer: B) 5", "C"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=20, help="times that every pair is judged (20)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per kind of pair, and one for all of mathematics."""
    times: list[float] = []
    for kind, pairs in _PAIRS.items():
        responses = [(rf"So the answer is \boxed{{{given}}}.", expected) for given, expected in pairs]
        kind_times = _times(verify_math, responses, args.repeats)
        times += kind_times
        yield {"case": f"math, {kind}", "pairs": len(pairs), **_summary(kind_times)}
    yield {"case": "math, all", "pairs": sum(map(len, _PAIRS.values())), **_summary(times)}
    yield {"case": "multiple choice", "pairs": len(_CHOICES), **_summary(_times(verify_choice, _CHOICES, args.repeats))}


def _times(verifier: Verifier, pairs: list[tuple[str, str]], repeats: int) -> list[float]:
    """Milliseconds of processor time of every judgement, nothing taken from a cache of answers read before."""
    times = []
    for repeat in range(-1, repeats):
        for response, expected in pairs:
            prompt = Prompt("p:1", (1,), "?", expected, "math")
            for cached in (read, parse_latex_cached, extract_latex):
                cached.cache_clear()
            began = time.process_time()
            verifier(prompt, response)
            if repeat >= 0:  # the first round fills the parser's tables
                times.append(1e3 * (time.process_time() - began))
    return times


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 3),
        "p95_ms": round(statistics.quantiles(times, n=20)[-1], 3),
        "max_ms": round(max(times), 3),
    }
