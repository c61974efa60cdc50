"""What a response votes for in a majority: the answer that its verifier reads, written in one way."""

from collections.abc import Callable

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.choice import chosen_letters, verify_choice
from megatron_vcppo.rewards.math_answer import MathVerifier, canonical
from megatron_vcppo.rewards.registry import tagged_answer, verify_reasoning_gym, verify_synthetic
from megatron_vcppo.rewards.verifier import Verifier, final_answer
from megatron_vcppo.tasks.task import read_answer

AnswerReader = Callable[[Prompt, str], str | None]
"""Given a prompt and a response's text: its answer, None if it has none."""


def answer_reader(verifier: Verifier | None) -> AnswerReader | None:
    """How the answers that a verifier judges are read; None where there are none to count: programs, own verifiers.

    Answers that are written differently but mean the same get one text where that takes no search: numbers by value,
    letters, LaTeX without its layout, words in lower case. The rest (x² - 1 and (x - 1)(x + 1)) counts as different.
    """
    if isinstance(verifier, MathVerifier):
        return _math
    if verifier is verify_choice:
        return lambda prompt, response: chosen_letters(prompt, response) or None
    if verifier is verify_synthetic:
        return lambda prompt, response: read_answer(response)
    if verifier is verify_reasoning_gym:
        return lambda prompt, response: tagged_answer(response) or None
    return None


def _math(prompt: Prompt, response_text: str) -> str | None:
    given = final_answer(response_text)
    return canonical(given) if given and given.strip() else None
