"""Whether what a program printed is what is expected: by tokens, or by a checker that the problem names."""

import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

Checker = Callable[[str, str, str], bool]
"""(input, expected output, printed output) → right or wrong."""

_TOLERANCE = 1e-6
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_LONGEST_NUMBER = 1000  # digits; longer ones are compared as text


def same_tokens(given: str, expected: str) -> bool:
    """Equal word by word, whatever blanks and line ends are between.

    Numbers are equal by value ("3.0" is "3"); where the expected one has a point or an exponent, they may differ by
    10⁻⁶, relative or absolute. Case matters.
    """
    words, wanted = given.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_token, words, wanted))


def output_limit(expected: str) -> int:
    """Bytes of output beyond which a program prints something else, however it writes its numbers."""
    return 16 * len(expected.encode(errors="replace")) + (64 << 10)


def _same_token(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if max(len(given), len(expected)) > _LONGEST_NUMBER:
        return False
    if not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(expected)):
        return False
    try:
        if Decimal(given) == Decimal(expected):
            return True
    except InvalidOperation:
        return False
    if expected.lstrip("+-").isdigit():
        return False
    return math.isclose(float(given), float(expected), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().split("\n")]


def _line_multiset(text: str) -> Counter[tuple[str, ...]]:
    return Counter(tuple(line) for line in _lines(text))


CHECKERS: dict[str, Checker] = {
    "tokens": lambda _, expected, given: same_tokens(given, expected),
    "lines": lambda _, expected, given: len(_lines(given)) == len(_lines(expected)) and same_tokens(given, expected),
    "exact": lambda _, expected, given: given.rstrip("\n") == expected.rstrip("\n"),
    "ignore_case": lambda _, expected, given: same_tokens(given.lower(), expected.lower()),
    "unordered_lines": lambda _, expected, given: _line_multiset(given) == _line_multiset(expected),
    "unordered_tokens": lambda _, expected, given: Counter(given.split()) == Counter(expected.split()),
}
"""Checkers by the name that a problem gives; ``rewards.code.checkers`` adds a user's own."""
