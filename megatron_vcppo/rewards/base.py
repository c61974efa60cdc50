"""What a verifier is: it reads a prompt and a response and says right or wrong, +1 or -1."""

import re
from dataclasses import dataclass
from typing import Protocol

from megatron_vcppo.records import Prompt


@dataclass(frozen=True)
class Verdict:
    """A reward and why: "correct", "wrong", "no answer", …, with details after a colon."""

    reward: float
    verdict: str

    @property
    def kind(self) -> str:
        """The verdict without its details, for counting."""
        return self.verdict.partition(":")[0]


class Verifier(Protocol):
    """Verifiers may be slow or raise: they run in worker processes under a time limit (see scorer.py)."""

    def __call__(self, prompt: Prompt, response_text: str) -> Verdict:
        """Judge one complete response, given as text without special tokens."""


CORRECT = Verdict(1.0, "correct")
NO_ANSWER = Verdict(-1.0, "no answer")


def wrong(detail: str = "") -> Verdict:
    """A wrong answer, with what was wrong about it."""
    return Verdict(-1.0, f"wrong: {detail}" if detail else "wrong")


def after_thinking(response_text: str) -> str:
    """What follows the last ``</think>``; the whole text if the tag is not in it."""
    return response_text.rpartition("</think>")[2]


def final_answer(response_text: str) -> str | None:
    r"""What a response gives as its answer: the last ``\boxed{…}``, else what follows the last ``Answer:`` on its line.

    Looked for behind the thinking first; None if there is neither.
    """
    text = after_thinking(response_text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    lines = re.findall(r"(?im)^.*\banswer(?: is)?\s*[:：]\s*(.+?)\s*$", text)
    return lines[-1].strip("*$ ") if lines else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{…}`` (or ``\fbox{…}``), braces matched; None if there is none."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i].strip()
    return None
