"""What responses vote for: one text for one answer, none where there is nothing to count."""

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import VERIFIERS
from megatron_vcppo.rewards.votes import answer_reader


def vote(task: str, response: str, prompt: str = "") -> str | None:
    reader = answer_reader(VERIFIERS[task])
    assert reader is not None
    return reader(Prompt("p:1", (), prompt, "", task), response)


@pytest.mark.parametrize(
    "answers",
    [
        [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{ $\dfrac12$ }", "#### 1/2"],
        [r"\boxed{1,000}", r"\boxed{1000}", "Answer: 1000.0"],
        [r"\boxed{\text{Even}}", r"\boxed{\text{even}}"],
        [r"\boxed{\left(1, 2\right)}", r"\boxed{(1, 2)}"],
    ],
)
def test_answers_that_differ_in_layout_vote_together(answers: list[str]) -> None:
    assert len({vote("math", answer) for answer in answers}) == 1


def test_other_answers_vote_apart() -> None:
    texts = ["1", "2", "-1", "1/3", "x", "(1, 2)", "[1, 2]", "1" * 3000, "1" * 3001]
    assert len({vote("math_percent", rf"\boxed{{{text}}}") for text in texts}) == len(texts)


def test_letters_words_and_tags() -> None:
    options = "Which?\nA) red\nB) blue\n"
    assert (
        vote("multiple_choice", r"\boxed{\text{(B)}}", options)
        == "B"
        == vote("multiple_choice", "Answer: blue", options)
    )
    assert vote("running_sum", "<think> </think> = 7") == "7"
    assert vote("reasoning_gym", "<answer> 4 5 </answer>") == "4 5"


@pytest.mark.parametrize("task", ["math", "multiple_choice", "running_sum", "reasoning_gym"])
def test_no_answer_is_no_vote(task: str) -> None:
    assert vote(task, "I do not know") is None


def test_programs_and_own_verifiers_have_no_votes() -> None:
    assert answer_reader(VERIFIERS["code"]) is None and answer_reader(None) is None
