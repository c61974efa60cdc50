"""Which verifier judges which task."""

import importlib
from collections.abc import Mapping

from megatron_vcppo.errors import UserError
from megatron_vcppo.rewards.base import Verifier
from megatron_vcppo.rewards.choice import verify_choice
from megatron_vcppo.rewards.code import CodeVerifier
from megatron_vcppo.rewards.math_answer import MathVerifier, verify_math
from megatron_vcppo.rewards.synthetic import verify_synthetic
from megatron_vcppo.tasks.generate import TASKS

VERIFIERS: dict[str, Verifier] = {
    **dict.fromkeys(TASKS, verify_synthetic),
    "math": verify_math,
    "math_percent": MathVerifier(percent_as_decimal=True),
    "multiple_choice": verify_choice,
    "code": CodeVerifier(),
}
"""Verifier by name; a prompt whose task has one of these names is judged by it."""


def resolve_verifiers(extra: Mapping[str, str]) -> dict[str, Verifier]:
    """All verifiers by task: the built-in ones and the user's.

    extra: task → name of a built-in verifier ("gpqa": "multiple_choice") or ``module:function`` of one's own.
    Raises UserError if one cannot be found.
    """
    verifiers = dict(VERIFIERS)
    for task, name in extra.items():
        if name in VERIFIERS:
            verifiers[task] = VERIFIERS[name]
            continue
        module, colon, attribute = name.partition(":")
        if not colon:
            known = ", ".join(sorted(VERIFIERS))
            raise UserError(f"prompts.verifiers.{task}: no verifier {name!r}; use one of {known}, or module:function")
        try:
            verifiers[task] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"prompts.verifiers.{task}: cannot import {name}: {error}") from error
    return verifiers
