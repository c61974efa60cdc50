r"""Mathematical answers: equal as written after cleaning, equal as numbers, or equal as expressions.

Not a computer algebra system: two expressions are equal if they agree at a few fixed points, exactly where all is
rational and to 1e-9 otherwise (polynomial identity testing). That covers ``\frac{1}{2}`` = ``0.5``,
``2\sqrt{3}`` = ``\sqrt{12}``, ``(x+1)^2`` = ``x^2+2x+1``; sets, tuples and intervals are compared part by part.
"""

import math
import re
from fractions import Fraction

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.base import CORRECT, NO_ANSWER, Verdict, final_answer, wrong
from megatron_vcppo.rewards.expression import NotAnExpression, Number, evaluate, variables

_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_DROPPED = re.compile(
    r"\\\$|\\(?:left|right|displaystyle|,|;|:|!|quad|qquad|\s)|[$~]|\\[%]|%|\^\s*\{?\s*\\circ\s*\}?|°"
)
_UNITS = re.compile(
    r"(?<=[\d}])\s*(?:units?|degrees?|dollars?|cents?|inch(?:es)?|feet|meters?|metres?|cm|km|kg|miles?|hours?|minutes?"
    r"|seconds?|points?|square|cubic)(?:\s*(?:units?|inch(?:es)?|feet|meters?|cm|\^?\d))*\s*$"
)
_POINTS = ((0.7310585, 1.2689414, 2.3978953), (1.9459101, 0.4054651, 3.1415926), (-0.6137056, 2.7080502, 0.5596158))


def verify_math(prompt: Prompt, response_text: str) -> Verdict:
    r"""The last ``\boxed{…}`` (or ``Answer: …``) must equal the prompt's answer."""
    given = final_answer(response_text)
    if given is None or not given.strip():
        return NO_ANSWER
    expected = final_answer(prompt.answer) or prompt.answer
    return CORRECT if answers_equal(given, expected) else wrong(given[:80])


def answers_equal(given: str, expected: str) -> bool:
    """Whether two answers mean the same; symmetric."""
    given, expected = clean(given), clean(expected)
    if given == expected:
        return True
    brackets, left = _parts(given)
    other_brackets, right = _parts(expected)
    if len(left) != len(right) or brackets != other_brackets:
        return False
    if len(left) == 1 and not brackets:
        return _same_value(given, expected)
    if brackets == "{}":  # a set has no order
        return all(any(answers_equal(a, b) for b in right) for a in left) and all(
            any(answers_equal(a, b) for a in left) for b in right
        )
    return all(answers_equal(a, b) for a, b in zip(left, right, strict=True))


def clean(answer: str) -> str:
    r"""Without what does not change the meaning: $, \left, \text{…}, units, thousands separators, "x =", final dots."""
    answer = answer.strip().rstrip(".").strip()
    for _ in range(3):
        answer = _WRAPPERS.sub(r" \1 ", answer)
    answer = _DROPPED.sub(" ", answer)
    answer = answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\cdot", "*")
    answer = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", answer)
    answer = re.sub(r"^\s*[A-Za-z](?:\([A-Za-z]\))?\s*=(?!=)", "", answer)
    answer = _UNITS.sub("", answer)
    return re.sub(r"\s+", " ", answer).strip().rstrip(".")


def _parts(answer: str) -> tuple[str, list[str]]:
    r"""Brackets ("()", "[)", "{}", "" for none) and the parts between top-level commas."""
    plain = answer.replace(r"\{", "⟨").replace(r"\}", "⟩").replace(r"\lbrace", "⟨").replace(r"\rbrace", "⟩")
    brackets = ""
    if len(plain) > 1 and plain[0] in "([⟨" and plain[-1] in ")]⟩" and _closes_last(plain):
        brackets = (plain[0] + plain[-1]).replace("⟨", "{").replace("⟩", "}")
        plain = plain[1:-1]
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(plain):
        depth += (letter in "([{⟨") - (letter in ")]}⟩")
        if letter == "," and depth == 0:
            parts.append(plain[start:i].strip())
            start = i + 1
    parts.append(plain[start:].strip())
    if len(parts) == 1 and brackets == "()":
        return "", parts  # (5) is 5
    return brackets, parts


def _closes_last(text: str) -> bool:
    """Whether the first bracket is closed by the last letter: "(1, 2)" but not "(1)(2)"."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([⟨") - (letter in ")]⟩")
        if depth == 0:
            return i == len(text) - 1
    return False


def _same_value(left: str, right: str) -> bool:
    names = variables(left)
    if names != variables(right) or (names and not re.search(r"[\d+\-*/^\\]", left + right)):
        return False  # words are not products of letters
    try:
        for point in _POINTS if names else _POINTS[:1]:
            values = {name: point[i % 3] + i // 3 for i, name in enumerate(sorted(names))}
            if not _close(evaluate(left, values), evaluate(right, values)):
                return False
    except NotAnExpression:
        return False
    return True


def _close(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=1e-18)
