"""Which mathematical answers mean the same: pairs of every kind (math_pairs.txt), policies, hostile answers."""

import time
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.algebra import read
from megatron_vcppo.rewards.evaluate_expression import TooLarge, plain
from megatron_vcppo.rewards.math_answer import MathVerifier, answers_equal, verify_math
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.rewards.units import split_unit
from megatron_vcppo.rewards.verifier import Verdict, final_answer


def read_pairs() -> dict[tuple[str, bool], list[tuple[str, str]]]:
    """(kind, equal) → pairs."""
    pairs: dict[tuple[str, bool], list[tuple[str, str]]] = defaultdict(list)
    kind = ""
    for line in (Path(__file__).parent / "math_pairs.txt").read_text().splitlines():
        if line.startswith("# "):
            kind = line[2:]
            continue
        equal = " == " in line
        given, expected = line.split(" == " if equal else " <> ")
        pairs[kind, equal].append((given, expected))
    return dict(pairs)


PAIRS = read_pairs()


def prompt(answer: str) -> Prompt:
    return Prompt("p:1", (1,), "?", answer, "math")


@pytest.mark.parametrize("kind", [kind for kind, equal in PAIRS if equal])
def test_equal_answers(kind: str) -> None:
    assert [pair for pair in PAIRS[kind, True] if not answers_equal(*pair)] == []


@pytest.mark.parametrize("kind", [kind for kind, equal in PAIRS if not equal])
def test_different_answers(kind: str) -> None:
    assert [pair for pair in PAIRS[kind, False] if answers_equal(*pair)] == []


def test_long_numbers() -> None:
    assert answers_equal("9" * 3000, "9" * 3000 + ".0") and not answers_equal("9" * 3000, "9" * 2999 + "8")
    assert not answers_equal("9" * 10_000, "9" * 9_999)
    assert not answers_equal("", "") and not answers_equal("", "0")


@pytest.mark.parametrize(
    ("decimal", "exact", "equal"),
    [
        ("0.333", r"\frac13", False),
        ("0.3333333333", r"\frac13", True),
        ("0.3333333334", r"\frac13", False),
        ("9.9999999999", "10", False),
        ("4.123105625617661", r"\sqrt{17}", True),
        ("4.123105625617671", r"\sqrt{17}", False),
        ("9.99999999999", r"\sqrt{100}", False),
        ("3.14159", r"\pi", False),
    ],
)
def test_decimals_are_exact_unless_long_and_endless(decimal: str, exact: str, equal: bool) -> None:
    assert answers_equal(decimal, exact) is equal and answers_equal(exact, decimal) is equal


@pytest.mark.parametrize("percent", [r"50\%", "50 percent", r"$50\%$", "50%"])
def test_percent_is_a_decimal_only_on_request(percent: str) -> None:
    assert answers_equal(percent, "50") and not answers_equal(percent, "0.5")
    assert answers_equal(percent, "0.5", percent_as_decimal=True) and answers_equal(percent, "50", True)
    assert answers_equal("0.5", percent, True) and not answers_equal(percent, "0.05", True)
    response = rf"\boxed{{{percent}}}"
    assert verify_math(prompt("1/2"), response).verdict.startswith("wrong")
    assert MathVerifier(percent_as_decimal=True)(prompt("1/2"), response).verdict == "correct"


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12 cm", "12", "cm"),
        (r"5\text{ square centimeters}", "5", "cm^2"),
        ("40 km/hr", "40", "km/h"),
        (r"\$5", "5", "dollar"),
        ("7 apples", "7", "?"),
        ("5t", "5t", ""),
        ("2x+5d", "2x+5d", ""),
        ("6 pi", "6 pi", ""),
        ("x", "x", ""),
    ],
)
def test_units(text: str, value: str, unit: str) -> None:
    assert split_unit(text) == (value, unit)


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"<think> \boxed{3} </think> So \boxed{\frac{14}{2}}.", "correct"),
        (r"first \boxed{3}, no, \boxed{7}", "correct"),
        (r"\boxed{7} and then \boxed{8}", "wrong: 8"),
        (r"\boxed{7} and \boxed{8}", "wrong: 7, 8"),
        (r"\boxed{7} Answer: 8", "correct"),
        (r"<think> \boxed{7} </think> I give up", "no answer"),
        (r"<think> \boxed{7", "no answer"),
        (r"\boxed{7", "no answer"),
        (r"\boxed{}", "no answer"),
        (r"\\boxed{7}", "correct"),
        ("so\nAnswer: 7", "correct"),
        ("**Answer:** $7$", "correct"),
        ("**Answer**: 7.", "correct"),
        ("**Final Answer: 7**", "correct"),
        ("Answer:\n\n\\[ 7 \\]", "correct"),
        ("The answer is **7**.", "correct"),
        ("the final answer is $7$. I hope it is correct.", "correct"),
        ("The answer is 7, because 7 = 7.", "correct"),
        ("The answer is: $x = 7$.", "correct"),
        ("Final Answer: The largest $n$ is 7.", "correct"),
        ("the answer is 8. No, the answer is 7.5. Wait, the answer is 7", "correct"),
        ("so 3 + 4 = 7\n#### 7", "correct"),
        ("7", "no answer"),
        ("", "no answer"),
    ],
)
def test_only_the_final_answer_counts(response: str, verdict: str) -> None:
    assert verify_math(prompt("7"), response) == Verdict(1.0 if verdict == "correct" else -1.0, verdict)


def test_boxes_next_to_each_other_are_one_answer() -> None:
    assert final_answer(r"\boxed{\frac{1}{\sqrt{2}}} done") == r"\frac{1}{\sqrt{2}}"
    assert final_answer(r"$\boxed{1}$, $\boxed{2}$ and \(\boxed{3}\)") == "1, 2, 3"
    assert verify_math(prompt(r"\{1, 2\}"), r"\boxed{2} \text{ and } \boxed{1}").verdict == "correct"
    assert verify_math(prompt(r"the answer is \boxed{\frac{1}{2}}"), r"\boxed{0.5}").verdict == "correct"
    assert verify_math(prompt("two words #### 1,234"), r"\boxed{1234}").verdict == "correct"


HOSTILE = {
    "tower": "9^{9^{9^{9^9}}}",
    "large power": "2^{3000000000}",
    "factorials": "(10^{10})!",
    "double factorials": "10!!!!!",
    "tower of a variable": "x^{x^{x^{x^{x^x}}}}",
    "binomial": r"\binom{1000000000}{100000000}",
    "gamma": r"\Gamma(1000000000)",
    "long sum": r"\sum_{k=1}^{1000000000} k!",
    "long product": r"\prod_{k=1}^{1000000000} k",
    "exponentials": r"e^{e^{e^{e^{100}}}}",
    "many names": "(a+b+c+d+e+f)^{1000}",
    "scientific": "1e999999999",
    "deep brackets": "(" * 5000 + "1" + ")" * 5000,
    "deep fractions": r"\frac{1}{" * 500 + "2" + "}" * 500,
    "10,000 digits": "1" * 10_000,
    "10,000 letters": "x" * 10_000,
    "10,000 signs": "+".join(["1"] * 5000),
    "10,000 parts": ",".join(["1"] * 5000),
    "10,000 spaces": "1" + " " * 10_000 + "2",
    "1,000 ±": r"\pm1" * 250,
    "2,000 thousands": "1,234" * 390,
    "roots": "sqrt(" * 390,
    "arguments": r"\frac\sqrt{" * 150 + "}" * 150,
    "open arguments": r"\frac{" * 300,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_at_once(name: str) -> None:
    """Far below the worker's limit; the bound is on processor time, which other processes do not add to."""
    began = time.process_time()
    for expected in ("5", "x^2+1", r"(1,\infty)"):
        assert not answers_equal(HOSTILE[name], expected)
    assert time.process_time() - began < 5


def test_what_is_too_large_is_not_evaluated() -> None:
    for text in (HOSTILE["tower"], HOSTILE["large power"], HOSTILE["factorials"], HOSTILE["long sum"]):
        with pytest.raises(TooLarge):
            plain(read(text))
    assert answers_equal("9^{9^{9^{9}}}", " 9^{9^{9^{9}}}.")  # equal as written


def test_verifier_processes_judge_math() -> None:
    answers = [r"\boxed{\frac{2}{4}}", r"\boxed{9^{9^{9^9}}}", r"\boxed{x \in (0,1)}", "Answer: 50%"]
    with Scorer(num_workers=1, timeout_s=20.0, verifiers={"percents": "math_percent"}) as scorer:
        rollouts = [
            Rollout(Prompt(f"p:{i}", (1,), "?", "1/2", "percents"), 0, 0, (1,), text, (0.0,), "stop", 0)
            for i, text in enumerate(answers)
        ]
        verdicts = [rollout.verdict for rollout in scorer.score(rollouts)]
    assert [verdict.partition(":")[0] for verdict in verdicts] == ["correct", "wrong", "wrong", "correct"]
