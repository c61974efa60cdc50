"""What a verifier is: it reads a prompt and a response and returns right or wrong, +1 or -1."""

import re
from dataclasses import dataclass
from typing import Protocol

from megatron_vcppo.records import Prompt

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)[ \t\n]{0,8}\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$]|\\[()\[\],; ]|\\q?quad|\\text\{)*(?:and|or)?(?:[\s,;$}]|\\[()\[\],; ]|\\q?quad)*"
)
_MAX_BETWEEN = 60
_MAX_BOXES = 64
_STATED = re.compile(r"\banswers?[*_ \t]{0,4}(?:is|are|:|：)[*_]{0,3}(?!\w)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.[*_$]{0,4}\s+(?=\S)|[!?]\s|\s\(?(?=(?:because|since)\b)")
_PROSE = re.compile(r"(?:the|there|so|thus|hence|therefore|it|its)\b.*\b(?:is|are|equals)\s", re.IGNORECASE)


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


UNJUDGED = "unjudged"
"""Task of prompts that no verifier judges; they need no answer."""
CORRECT = Verdict(1.0, "correct")
NO_ANSWER = Verdict(-1.0, "no answer")


def wrong(detail: str = "") -> Verdict:
    """A wrong answer, with what was wrong about it."""
    return Verdict(-1.0, f"wrong: {detail}" if detail else "wrong")


def after_thinking(response_text: str) -> str:
    """What follows the last ``</think>``; the whole text if the tag is not in it."""
    return response_text.rpartition("</think>")[2]


def final_answer(response_text: str) -> str | None:
    r"""What a response gives as its answer, or None: the last of the strongest form that it has.

    ``\boxed{…}``; without one "Answer: …" or "the answer is …", to the end of the sentence; without that, what follows
    "####". Looked for behind the thinking only; a box that is not closed is none.
    """
    text = after_thinking(response_text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    stated = list(_STATED.finditer(text))
    if stated:
        return _sentence(text[stated[-1].end() :]) or None
    _, marked, behind = text.rpartition("####")
    return (behind.strip().partition("\n")[0].strip() or None) if marked else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{…}`` or ``\fbox{…}``, braces matched; None if there is none.

    Boxes with only a comma, "and" or "or" between them are one answer: "\boxed{1} and \boxed{2}" gives "1, 2".
    Takes time linear in the length of the text.
    """
    if "boxed" not in text and "fbox" not in text:
        return None
    boxes: list[tuple[int, int, int]] = []  # start, start of the content, end
    opened: list[tuple[int, int] | None] = []  # start of a box and of its content; None for other braces
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            box = opened.pop() if opened else None
            if box:
                boxes.append((*box, match.end()))
        elif match[0] == "{":
            opened.append(None)
        elif len(match[0]) > 2:
            opened.append(match.span())
    if not boxes:
        return None
    boxes.sort(reverse=True)
    contents: list[str] = []
    start = 0
    for earlier, inside, end in boxes[:_MAX_BOXES]:
        if contents and not (start - end <= _MAX_BETWEEN and _BETWEEN_BOXES.fullmatch(text, end, start)):
            break
        contents.insert(0, text[inside : end - 1].strip())
        start = earlier
    return ", ".join(contents)


def _sentence(text: str) -> str:
    """What the first sentence of a text states, without markdown: "The volume is 12 cm. Done" gives "12 cm"."""
    text = text.lstrip(" \t\r\n*_:：")
    for opening, closing in (("\\[", "\\]"), ("$$", "$$")):
        if text.startswith(opening):
            return text[2:].partition(closing)[0].strip()
    sentence = _SENTENCE_END.split(text.partition("\n")[0], maxsplit=1)[0].strip(" *_\t\r")
    prose = _PROSE.match(sentence)
    return sentence[prose.end() if prose else 0 :].removesuffix(".").strip(" *_")
