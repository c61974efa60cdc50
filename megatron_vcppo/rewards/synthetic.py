"""Exact verifiers of the synthetic tasks."""

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.verifier import CORRECT, NO_ANSWER, Verdict, wrong
from megatron_vcppo.tasks.generate import get_task
from megatron_vcppo.tasks.task import read_answer
from megatron_vcppo.tasks.word_tokenizer import BOS


def verify_synthetic(prompt: Prompt, response_text: str) -> Verdict:
    """The response must end in ``</think> = answer``, and the answer must solve the prompt of its task."""
    given = read_answer(response_text)
    if given is None:
        return NO_ANSWER
    question = prompt.text.removeprefix(BOS).strip()  # a chat template writes BOS itself
    return CORRECT if get_task(prompt.task).is_correct(question, prompt.answer, given) else wrong()
