"""Multiple choice: the letter that the response settles on."""

import re

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.base import CORRECT, NO_ANSWER, Verdict, after_thinking, final_answer, wrong

_LETTER = re.compile(r"^\W*(?:\\text(?:bf)?\{)?\W*([A-Za-z])(?![A-Za-z])")
_STATED = re.compile(r"(?i)\banswer\b[^.\n]{0,40}?\bis\b\W*([A-Z])\b")


def verify_choice(prompt: Prompt, response_text: str) -> Verdict:
    r"""The answer is a letter. Read from ``\boxed{B}`` or ``Answer: (B)``, else from the last "answer is B"."""
    given = final_answer(response_text)
    match = _LETTER.match(given) if given else None
    if match is None:
        stated = list(_STATED.finditer(after_thinking(response_text)))
        match = stated[-1] if stated else None
    if match is None:
        return NO_ANSWER
    return CORRECT if match[1].upper() == prompt.answer.strip(" ().").upper() else wrong(match[1].upper())
