"""Which verifier judges which task."""

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_vcppo.config import CodeRewardConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.choice import verify_choice
from megatron_vcppo.rewards.code import CodeVerifier
from megatron_vcppo.rewards.math_answer import MathVerifier, verify_math
from megatron_vcppo.rewards.verifier import (
    CORRECT,
    NO_ANSWER,
    UNJUDGED,
    Verdict,
    Verifier,
    after_thinking,
    final_answer,
    wrong,
)
from megatron_vcppo.tasks import reasoning_gym
from megatron_vcppo.tasks.generate import TASKS, get_task
from megatron_vcppo.tasks.task import read_answer
from megatron_vcppo.tasks.word_tokenizer import BOS

_REFERENCE = re.compile(r"\w+(\.\w+)*:\w+")
_CODE_SHARE = 0.8  # of the time for an answer: the verifier reports a slow program before it is itself too slow


def verify_synthetic(prompt: Prompt, response_text: str) -> Verdict:
    """The response must end in ``</think> = answer``, and the answer must solve the prompt of its task."""
    given = read_answer(response_text)
    if given is None:
        return NO_ANSWER
    question = prompt.text.removeprefix(BOS).strip()  # a chat template writes BOS itself
    return CORRECT if get_task(prompt.task).is_correct(question, prompt.answer, given) else wrong()


def verify_reasoning_gym(prompt: Prompt, response_text: str) -> Verdict:
    """Right if the problem's own scoring gives the full score to what stands between the last <answer> tags."""
    given = tagged_answer(response_text)
    if not given:
        return NO_ANSWER
    score = reasoning_gym.score(prompt.answer, given)
    return CORRECT if score >= 1.0 else wrong(f"score {score:.3g}")


def verify_nothing(prompt: Prompt, response_text: str) -> Verdict:
    """Neither right nor wrong, for prompts without an answer, which a reward model judges alone."""
    return Verdict(0.0, "not judged")


def tagged_answer(response_text: str) -> str | None:
    """What stands between the last <answer> tags behind the thinking; without tags, the final answer in any form."""
    tagged = re.findall(r"<answer>(.*?)</answer>", after_thinking(response_text), re.DOTALL)
    return tagged[-1].strip() if tagged else final_answer(response_text)


VERIFIERS: dict[str, Verifier] = {
    **dict.fromkeys(TASKS, verify_synthetic),
    "math": verify_math,
    "math_percent": MathVerifier(percent_as_decimal=True),
    "multiple_choice": verify_choice,
    "code": CodeVerifier(),
    reasoning_gym.TASK: verify_reasoning_gym,
    UNJUDGED: verify_nothing,
}
"""Verifier by name; a prompt whose task has one of these names is judged by it."""


def resolve_verifiers(
    extra: Mapping[str, str], code: CodeRewardConfig | None = None, timeout_s: float = 10.0
) -> dict[str, Verifier]:
    """All verifiers by task: the built-in ones and the user's.

    extra: task → name of a built-in verifier ("gpqa": "multiple_choice") or ``module:function`` of one's own.
    timeout_s: for one answer. Raises UserError if one cannot be found.
    """
    code = code or CodeRewardConfig()
    check_names(extra, code)
    checkers = {name: _imported(f"rewards.code.checkers.{name}", where) for name, where in code.checkers.items()}
    built_in = VERIFIERS | {
        "code": CodeVerifier(_CODE_SHARE * timeout_s, code.memory_mib << 20, code.isolation, checkers)
    }
    verifiers = dict(built_in)
    for task, name in extra.items():
        verifiers[task] = built_in[name] if name in built_in else _imported(f"prompts.verifiers.{task}", name)
    return verifiers


def check_names(extra: Mapping[str, str], code: CodeRewardConfig) -> None:
    """UserError for what is neither a built-in verifier nor ``module:function``; nothing is imported."""
    for task, name in extra.items():
        if name not in VERIFIERS and not _REFERENCE.fullmatch(name):
            known = ", ".join(sorted(VERIFIERS))
            raise UserError(f"prompts.verifiers.{task}: no verifier {name!r}; use one of {known}, or module:function")
    for checker, name in code.checkers.items():
        if not _REFERENCE.fullmatch(name):
            raise UserError(f"rewards.code.checkers.{checker}: {name!r} must be module:function")


def check_answer(verifiers: Mapping[str, Verifier], task: str, answer: str) -> None:
    """Raises ValueError if the task's verifier cannot judge by this answer; for when data are read."""
    verifier = verifiers.get(task)
    if isinstance(verifier, CodeVerifier):
        verifier.check_answer(answer)


def isolation_of_code(verifiers: Mapping[str, Verifier], tasks: Collection[str]) -> str:
    """The isolation under which programs are run on this node; "" if none of the tasks has programs.

    Raises UserError if there is none that works and the configuration does not allow to do without.
    """
    for task in tasks:
        if isinstance(verifier := verifiers[task], CodeVerifier):
            return verifier.choose_isolation()
    return ""


def _imported(key: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {name}: {error}") from error
