"""What counts as right: synthetic tasks, mathematics, multiple choice."""

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.base import Verdict, final_answer
from megatron_vcppo.rewards.choice import verify_choice
from megatron_vcppo.rewards.math_answer import answers_equal, verify_math
from megatron_vcppo.rewards.synthetic import verify_synthetic
from megatron_vcppo.tasks.generate import TASKS, demonstration_rows


def prompt(answer: str, task: str = "math", text: str = "?") -> Prompt:
    return Prompt("p:1", (1,), text, answer, task)


EQUAL = [
    ("7", "7.0"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"1\frac{1}{2}", "3/2"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("$5$", "5."),
    (r"\$5.00", "5"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90 \text{ degrees}"),
    (r"12\text{ cm}", "12"),
    ("x = 5", "5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    (r"3 \times 10^{4}", "30000"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    ("1e3", "1000"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"\frac{x}{y}", "x/y"),
    (r"\left(1, \frac12\right)", "(1,0.5)"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("[0, 1)", "[0,1)"),
    (r"\text{Evelyn}", "Evelyn"),
    ("(5)", "5"),
    (r"\log 100", "2"),
    (r"|-3|", "3"),
    ("3+4i", "4i+3"),
    ("−3", "-3"),
]
DIFFERENT = [
    ("7", "8"),
    ("0.33", r"\frac13"),
    ("1000000000000000000001", "1000000000000000000000"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("1, 2", "1, 2, 3"),
    ("1 2", "2"),
    ("12", "1,2"),
    ("on", "no"),
    ("x", "y"),
    ("x^2", "x"),
    ("", "0"),
    (r"\sqrt{2}", "1.414"),
    ("5", "-5"),
    ("2^{100000}", "2^{100001}"),
    ("9" * 1000, "9" * 999),
    ("1/0", "2/0"),
    (r"\frac", "1"),
    ("(" * 5000, "1"),
    ("-" * 5000 + "1", "2"),
    (r"\{1,2\}", r"\{1,3\}"),
]


@pytest.mark.parametrize(("given", "expected"), EQUAL)
def test_equal_answers(given: str, expected: str) -> None:
    assert answers_equal(given, expected) and answers_equal(expected, given)


@pytest.mark.parametrize(("given", "expected"), DIFFERENT)
def test_different_answers(given: str, expected: str) -> None:
    assert not answers_equal(given, expected) and not answers_equal(expected, given)


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"<think> \boxed{3} </think> So \boxed{\frac{14}{2}}.", "correct"),
        (r"first \boxed{3}, no, \boxed{7}", "correct"),
        (r"\boxed{7} and then \boxed{8}", "wrong: 8"),
        (r"<think> \boxed{7} </think> I give up", "no answer"),
        (r"<think> \boxed{7", "no answer"),
        (r"\boxed{7", "no answer"),
        (r"\boxed{}", "no answer"),
        ("so\nAnswer: 7", "correct"),
        ("**Answer:** $7$", "correct"),
        ("", "no answer"),
    ],
)
def test_math_responses(response: str, verdict: str) -> None:
    assert verify_math(prompt("7"), response) == Verdict(1.0 if verdict == "correct" else -1.0, verdict)


def test_boxed_braces_are_matched() -> None:
    assert final_answer(r"\boxed{\frac{1}{\sqrt{2}}} done") == r"\frac{1}{\sqrt{2}}"
    assert verify_math(prompt(r"the answer is \boxed{\frac{1}{2}}"), r"\boxed{0.5}").reward == 1.0


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"\boxed{B}", "correct"),
        (r"\boxed{\text{(B)}}", "correct"),
        ("Answer: B", "correct"),
        ("Answer: (b) because", "correct"),
        ("the answer is C. No: the correct answer is **B**.", "correct"),
        (r"\boxed{C}", "wrong: C"),
        (r"\boxed{Both}", "no answer"),
        ("<think>the answer is B</think> unsure", "no answer"),
    ],
)
def test_choices(response: str, verdict: str) -> None:
    assert verify_choice(prompt("(B)", "multiple_choice"), response).verdict == verdict


@pytest.mark.parametrize("name", list(TASKS))
def test_synthetic_tasks(name: str) -> None:
    task = TASKS[name]
    for row in demonstration_rows(task, "train", task.default_steps, 0, 50):
        ask = prompt(row["answer"], name, row["prompt"])
        head = row["response"].rpartition("</think>")[0]
        assert verify_synthetic(ask, f"{head}</think> = {row['answer']}").verdict == "correct"
        chat = prompt(row["answer"], name, f"<bos> {row['prompt']}")
        assert verify_synthetic(chat, f"{head}</think> = {row['answer']}").verdict == "correct"
        assert verify_synthetic(ask, f"{head}</think> = {row['answer']} {row['answer']} 1").verdict == "wrong"
        assert verify_synthetic(ask, f"{head} = {row['answer']}").verdict == "no answer"
        assert verify_synthetic(ask, f"{head}</think> {row['answer']}").verdict == "no answer"
