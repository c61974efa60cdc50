r"""Mathematical answers: numbers are compared exactly, the rest is judged by math-verify and by what it lacks.

The order: the same text; the same rational number; words, clock times, ratios and numbers in another base as text;
lists (commas, "or", ±); then one object against another (algebra.py). A decimal is the number that it shows: 0.333 is
not 1/3. What cannot be read, or would take too much work, equals only the same text.
"""

import re
from dataclasses import dataclass

import sympy

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.algebra import by_name, intersection, read, same_list
from megatron_vcppo.rewards.evaluate_expression import (
    TooLarge,
    Tree,
    is_decimal,
    last_place,
    plain,
    rational,
    rationals_equal,
)
from megatron_vcppo.rewards.notation import expand_signs, has_degrees, join_thousands, split_top, tidy
from megatron_vcppo.rewards.units import split_unit, units_agree
from megatron_vcppo.rewards.verifier import CORRECT, NO_ANSWER, Verdict, final_answer, wrong

_MAX_LENGTH = 2000
_MAX_PARTS = 64
_SEPARATORS = r",|;|\s(?:and|or)\s|,?\s*\\text\{\s*(?:and|or)\s*\}"
_DECIMAL_COMMA = re.compile(r"-?(?:\d+,\d{1,2}|0,\d+)")
_TIME = re.compile(r"(\d{1,2}):(\d{2})\s*(?:\\text\{)?\s*([ap])?\.?\s*(?:m\.?)?\}?", re.IGNORECASE)
_RATIO = re.compile(r"\s*:\s*|(?<=[\d}])\s+to\s+(?=[\d\\])")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?_\{?\(?(\d+)\)?\}?", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the|point|line|option|day)\s+(?=\w)")
_WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z][A-Za-z\s'\"\-.,&/]*")
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|none exist|(?:the )?empty set|\\emptyset"
)
_UNREADABLE = (ValueError, ArithmeticError, TypeError, AttributeError, NotImplementedError, RecursionError, MemoryError)


@dataclass(frozen=True)
class MathVerifier:
    r"""The last ``\boxed{…}`` (or ``Answer: …``) must mean the prompt's answer."""

    percent_as_decimal: bool = False
    """Whether 50% also equals 0.5. It always equals 50 (the question may want percent)."""

    def __call__(self, prompt: Prompt, response_text: str) -> Verdict:
        """Judge one response."""
        given = final_answer(response_text)
        if given is None or not given.strip():
            return NO_ANSWER
        expected = final_answer(prompt.answer) or prompt.answer
        return CORRECT if answers_equal(given, expected, self.percent_as_decimal) else wrong(given[:80])


verify_math = MathVerifier()


def answers_equal(given: str, expected: str, percent_as_decimal: bool = False) -> bool:
    """Whether two answers mean the same.

    Not quite symmetric: x = 5 is right where 5 is expected and the other way round, but of a list without brackets
    only the expected answer decides whether its order counts.
    """
    given, expected = given.strip(), expected.strip()
    if given == expected:
        return bool(given)
    left, right = rational(given), rational(expected)
    if left is not None and right is not None:
        return rationals_equal(given, left, expected, right)
    if max(len(given), len(expected)) > _MAX_LENGTH:
        return "".join(given.split()) == "".join(expected.split())
    given, expected = tidy(given), tidy(expected)
    if not given or not expected:
        return False
    if given.lower() == expected.lower():
        return True
    return _values_equal(given, expected, percent_as_decimal)


def canonical(answer: str) -> str:
    """One text for answers that differ in layout or in how a number is written; "" only for a blank answer."""
    answer = answer.strip()
    if len(answer) > _MAX_LENGTH:
        return "".join(answer.split())
    text = join_thousands(tidy(answer)) or answer
    value = rational(text)
    return text.lower() if value is None else str(value)


def _values_equal(given: str, expected: str, percent_as_decimal: bool) -> bool:
    """The answers without their units, if these agree."""
    (given, given_unit), (expected, expected_unit) = split_unit(given), split_unit(expected)
    if not units_agree(given_unit, expected_unit):
        return False
    if percent_as_decimal and "percent" in (given_unit, expected_unit) and given_unit != expected_unit:
        as_decimal = [
            rf"\frac{{{value}}}{{100}}" if unit == "percent" else value
            for value, unit in ((given, given_unit), (expected, expected_unit))
        ]
        if _objects_equal(*as_decimal):
            return True
    if has_degrees(given) != has_degrees(expected) and r"\pi" in given + expected:
        given, expected = (_radians(text) if has_degrees(text) else text for text in (given, expected))
    if any(_DECIMAL_COMMA.fullmatch(one) and "." in other for one, other in ((given, expected), (expected, given))):
        given, expected = given.replace(",", "."), expected.replace(",", ".")
    joined = join_thousands(given), join_thousands(expected)
    if _objects_equal(*joined):
        return True
    one_joined = (joined[0] != given) != (joined[1] != expected)
    return one_joined and "," in joined[0] + joined[1] and _objects_equal(given, expected)


def _objects_equal(given: str, expected: str) -> bool:
    if given.lower() == expected.lower():
        return bool(given)
    left, right = rational(given), rational(expected)
    if left is not None and right is not None:
        return rationals_equal(given, left, expected, right)
    for compare in (_as_words, _as_times, _in_bases, _as_ratios):
        verdict = compare(given, expected)
        if verdict is not None:
            return verdict
    try:
        return _as_objects(given, expected)
    except _UNREADABLE:
        return False


def _as_words(given: str, expected: str) -> bool | None:
    """Compared as words, whatever their case, if either consists of words; None otherwise."""
    left, right = _words(given), _words(expected)
    empty = [bool(_NO_SOLUTION.fullmatch(text)) for text in (left or given, right or expected)]
    if any(empty):
        return all(empty)
    if left and right:
        return left == right
    if left or right:
        return True if (left or given.lower()) == (right or expected.lower()) else None
    return None


def _words(text: str) -> str:
    """Lower-case words without articles, quotes and final dots; "" if the text is not made of words."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\s+", " ", text).strip(" .\"'`").replace('"', "")
    if not _WORDS.fullmatch(text) or not re.search(r"[aeiouyAEIOUY]", text):
        return ""
    return _ARTICLE.sub("", text.lower())


def _as_times(given: str, expected: str) -> bool | None:
    left, right = _TIME.fullmatch(given), _TIME.fullmatch(expected)
    if not left or not right:
        return None
    times = [(int(time[1]), time[2], (time[3] or "").lower()) for time in (left, right)]
    return times[0][:2] == times[1][:2] and (times[0][2] == times[1][2] or "" in (times[0][2], times[1][2]))


def _in_bases(given: str, expected: str) -> bool | None:
    r"""204_5: the same digits, and the same base if both name one."""
    left, right = _BASED.fullmatch(given), _BASED.fullmatch(expected)
    if (left or right) and all(match is None or match[1][0].isdigit() for match in (left, right)):
        digits = [match[1] if match else text for match, text in ((left, given), (right, expected))]
        bases = {match[2] for match in (left, right) if match}
        return digits[0].lower() == digits[1].lower() and len(bases) == 1
    return None


def _as_ratios(given: str, expected: str) -> bool | None:
    """3:4 equals 6:8, "3 to 4" and 3/4; None if neither is a ratio."""
    left, right = (_RATIO.split(text.rpartition("=")[2].strip()) for text in (given, expected))
    if len(left) == len(right) == 1:
        return None
    if {len(left), len(right)} == {1, 2}:
        quotients = [rf"\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) > 1 else parts[0] for parts in (left, right)]
        return _objects_equal(*quotients)
    return len(left) == len(right) and all(
        _objects_equal(f"({a})({right[0]})", f"({b})({left[0]})") for a, b in zip(left[1:], right[1:], strict=True)
    )


def _as_objects(given: str, expected: str) -> bool:
    """Lists part by part, single objects as a whole. Raises ValueError where something cannot be read."""
    if is_decimal(given) != is_decimal(expected):
        return _is_rounding(given, expected) if is_decimal(given) else _is_rounding(expected, given)
    return same_list(_parts(expected), _parts(given))


def _is_rounding(decimal: str, exact: str) -> bool:
    """Whether a long decimal shows a number that has no finite decimal, to its last digit."""
    parts = _parts(exact)
    value = plain(parts[0]) if len(parts) == 1 else None
    if not isinstance(value, sympy.Expr) or value.is_Rational or value.free_symbols:
        return same_list(parts, _parts(decimal))
    shown = sympy.Rational(decimal)
    missing = ((value - shown) * sympy.sign(shown) / sympy.Rational(last_place(decimal))).evalf(len(decimal) + 10)
    return bool(missing.is_real and -0.5 <= missing < 1)


def _parts(text: str) -> list[Tree]:
    """The objects of a list without brackets, or of one with ± in it. Raises ValueError if one cannot be read."""
    braced = re.fullmatch(r"((?:[A-Za-z]\s*(?:=|\\in)\s*)?)\\\{(.*)\\\}", text)
    if braced and (r"\pm" in text or r"\mp" in text):
        text = braced[2]
    and_only = r"\s(?:and)\s|\s*\\text\{\s*and\s*\}\s*"
    conditions = split_top(text, and_only + (r"|," if r"\ne" in text else ""))
    if len(conditions) > 1 and all(re.search(r"[<>]|\\(?:le|ge|ne)\b", condition) for condition in conditions):
        return [intersection(_read(condition) for condition in conditions)]
    groups = [group for group in split_top(text, ";") if group]
    if len(groups) > 1 and any(len(split_top(group, ",")) > 1 for group in groups):  # p = 5, q = 2; p = 7, q = 2
        members = [_parts(group) for group in groups]
        return [sympy.Tuple(*(by_name(parts) or parts)) for parts in members]
    parts = [part for part in split_top(text, _SEPARATORS) if part]
    if len(parts) > _MAX_PARTS:
        raise TooLarge(f"a list of {len(parts)}")
    return [_read(variant) for part in parts for variant in expand_signs(part)]


def _read(text: str) -> Tree:
    nested = re.fullmatch(r"\[\s*(\[.*\])\s*\]", text)
    if nested:  # a matrix as programs write it
        rows = r"\\".join(row.strip("[] ").replace(",", "&") for row in split_top(nested[1], ","))
        text = rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"
    tree = read(text)
    if tree is None:
        raise ValueError(f"cannot read {text[:80]!r}")
    return tree


def _radians(text: str) -> str:
    return re.sub(r"^(.*?)\s*\^\s*\{?\s*\\circ\s*\}?$", r"\\frac{(\1)\\pi}{180}", text)
