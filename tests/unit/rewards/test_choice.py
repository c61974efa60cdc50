"""Multiple choice: which letter a response settles on."""

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.choice import listed_options, verify_choice

CITIES = "Which city is the capital of France?\n\nA) London\nB) Paris\nC) Rome\nD) Both A and C\n\nThink first."
NUMBERS = "How much is 1 - 1/2?\n(A) 1\n(B) $\\frac{1}{2}$\n(C) 2\n(D) 5\n"


def verdict(response: str, answer: str = "B", question: str = "?") -> str:
    return verify_choice(Prompt("p:1", (1,), question, answer, "multiple_choice"), response).verdict


@pytest.mark.parametrize(
    "response",
    [
        *(rf"\boxed{{\{wrapper}{{B}}}}" for wrapper in ("text", "mathrm", "textbf", "mathbf", "mathsf", "textit")),
        *(rf"\boxed{{\{wrapper}{{(B)}}}}" for wrapper in ("text", "mathrm", "textbf", "mathbf")),
        *(rf"\boxed{{{text}}}" for text in ("B", "(B)", "[B]", "B.", "b", r"\text{Option B}", r"\text{B. Paris}")),
        *(rf"\boxed{{{text}}}" for text in (r"\textbf{(B)}\ 5", "B: Paris", r"\boxed{B}", r"\text{Answer: B}")),
        *(f"Answer: {text}" for text in ("B", "B.", "**B**", "(B)", "(b) because", "$B$", "option B", "choice (B)")),
        *(
            f"Answer: {text}"
            for text in ("B) Paris", "B, since it is", "B because A is wrong", r"\text{B}", "B - Paris")
        ),
        "**Answer: B**",
        "**Answer**: B",
        "Final answer: \\(B\\)",
        "The answer is option B.",
        "The correct answer is (B) Paris.",
        "The correct option is B.",
        "Option B is correct.",
        "I would choose B.",
        "the answer is C. No: the correct answer is **B**.",
        r"<think> \boxed{C} </think> \boxed{B}",
        r"\boxed{B} and \boxed{B}",
    ],
)
def test_one_letter_in_every_wrapper(response: str) -> None:
    assert verdict(response) == "correct"
    assert verdict(response, answer=r"\text{(B)}") == "correct"
    assert verdict(response, answer="C") == "wrong: B"


@pytest.mark.parametrize(
    "response",
    [
        *(rf"\boxed{{{text}}}" for text in ("A, C", "A and C", r"\text{A and C}", "AC", "(A),(C)", "A/C", "C, A")),
        *(rf"\boxed{{{text}}}" for text in (r"\text{A}, \text{C}", r"A\ C", r"\textbf{(A)} \text{ or } \textbf{(C)}")),
        *(f"Answer: {text}" for text in ("A or C", "A, C", "A & C", "(A) and (C)")),
        r"\boxed{A}, \boxed{C}",
        "The answer is A and C.",
    ],
)
def test_more_than_one_letter_is_wrong(response: str) -> None:
    assert verdict(response, answer="A") == verdict(response, answer="C") == "wrong: AC"


@pytest.mark.parametrize(
    ("question", "response", "expected"),
    [
        (CITIES, r"\boxed{Paris}", "correct"),
        (CITIES, r"\boxed{\text{paris}}", "correct"),
        (CITIES, "Answer: Paris.", "correct"),
        (CITIES, r"\boxed{B Paris}", "correct"),
        (CITIES, "The answer is Rome", "wrong: C"),
        (CITIES, r"\boxed{\text{Both A and C}}", "wrong: D"),
        (CITIES, r"\boxed{Berlin}", "no answer"),
        (NUMBERS, r"\boxed{0.5}", "correct"),
        (NUMBERS, r"\boxed{2}", "wrong: C"),
        (NUMBERS, r"\boxed{3}", "no answer"),
        ("?", r"\boxed{Paris}", "no answer"),
    ],
)
def test_options_by_their_text(question: str, response: str, expected: str) -> None:
    assert verdict(response, question=question) == expected


def test_the_expected_answer_may_be_a_text() -> None:
    assert verdict(r"\boxed{B}", answer="Paris", question=CITIES) == "correct"
    with pytest.raises(ValueError, match="p:1: the answer of a multiple-choice problem"):
        verdict(r"\boxed{B}", answer="Madrid", question=CITIES)


@pytest.mark.parametrize(
    "response",
    [r"\boxed{Both}", "<think>the answer is B</think> unsure", "Answer: a cat", "Answer: I think so", "It is B.", ""]
    + ["The answer is not B.", r"\boxed{Apple}", "Answer: A cat"],
)
def test_words_are_no_letters(response: str) -> None:
    assert verdict(response) == "no answer"


def test_options_are_the_last_list_of_the_prompt() -> None:
    assert listed_options("A. one\nB. two\n\n(A) three\n(B) four\n(C) five") == {"A": "three", "B": "four", "C": "five"}
    assert listed_options("A. one sentence only") == {}
