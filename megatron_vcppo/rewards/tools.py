"""Tools that a policy calls within its response: which task has which, and what a tool is."""

import importlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.tasks.tool_sum import TOOL_SUM, DigitCalculator

MAX_OBSERVATION = 1 << 16
"""Characters of a tool's answer that are read."""
_REFERENCE = re.compile(r"\w+(\.\w+)*:\w+")


class Tool(Protocol):
    """Called when the policy writes ``stop``. It runs in a verifier's process, under the verifiers' limits.

    It should be a function of its arguments: an interrupted iteration may call it again.
    """

    @property
    def stop(self) -> str:
        """The text that ends a call. Generation pauses behind it."""

    def __call__(self, prompt: Prompt, text: str) -> str:
        """What follows the call, which is at the end of ``text``, the response so far; "" for nothing."""


TOOLS: dict[str, Tool] = {"digit_calculator": DigitCalculator()}
"""Built-in tools by name."""
OF_TASK = {TOOL_SUM.name: "digit_calculator"}
"""Tools of built-in tasks."""


def resolve_tools(extra: Mapping[str, str]) -> dict[str, Tool]:
    """Tools by task: those of built-in tasks, and the user's (``prompts.tools``).

    extra: task → name of a built-in tool, or ``module:name`` of one's own. Raises UserError if one cannot be found.
    """
    check_tools(extra)
    found: dict[str, Tool] = {}
    for task, name in {**OF_TASK, **extra}.items():
        found[task] = tool = TOOLS[name] if name in TOOLS else _imported(task, name)
        if not callable(tool) or not isinstance(stop := getattr(tool, "stop", None), str) or not stop:
            raise UserError(
                f"prompts.tools.{task}: {name} must be callable and have a text named stop, that ends a call"
            )
    return found


def check_tools(extra: Mapping[str, str]) -> None:
    """UserError for what is neither a built-in tool nor ``module:name``; nothing is imported."""
    for task, name in extra.items():
        if name not in TOOLS and not _REFERENCE.fullmatch(name):
            known = ", ".join(sorted(TOOLS))
            raise UserError(f"prompts.tools.{task}: no tool {name!r}; use one of {known}, or module:name")


def _imported(task: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"prompts.tools.{task}: cannot import {name}: {error}") from error
