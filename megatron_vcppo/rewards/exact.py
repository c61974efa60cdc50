"""Rational numbers, compared exactly: most answers are numbers, and math-verify rounds."""

import re
from fractions import Fraction

_DIGITS = 4000
"""Longer numbers are not read as numbers (Python refuses texts beyond 4,300 digits)."""
_ROUNDED = 10
"""Significant digits from which on a decimal may stand for a number that has no finite decimal."""
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    r"(?P<decimal>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<whole>\d+)?\s*\\frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}|(?P<top1>\d))\s*(?:\{\s*(?P<bottom>\d+)\s*\}|(?P<bottom1>\d))"
    r"|(?P<left>\d+)\s*/\s*(?P<right>\d+)"
    r")"
)


def rational(text: str) -> Fraction | None:
    r"""The value of an integer, decimal, a/b, ``\frac{a}{b}`` or mixed number; None for anything else."""
    match = _NUMBER.fullmatch(text) if len(text) <= _DIGITS else None
    if match is None:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"])
    else:
        top = int(match["left"] or match["top"] or match["top1"])
        bottom = int(match["right"] or match["bottom"] or match["bottom1"])
        if bottom == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(top, bottom)
    return -value if match["sign"] == "-" else value


def is_decimal(text: str) -> bool:
    """Whether the text is a decimal with enough digits to stand for a rounded number."""
    digits = text.lstrip("+-").replace(".", "", 1)
    return "." in text and digits.isdigit() and _ROUNDED <= len(digits.strip("0")) <= _DIGITS


def is_finite_decimal(value: Fraction) -> bool:
    """Whether a decimal can be written out in full: no prime factors but 2 and 5 in the denominator."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def last_place(text: str) -> Fraction:
    """What one more in the last digit of a decimal is worth."""
    return Fraction(1, 10 ** len(text.partition(".")[2]))


def rationals_equal(left_text: str, left: Fraction, right_text: str, right: Fraction) -> bool:
    """Equal as they are, or one the other's decimal to ten or more digits, which only rounding can end.

    0.333 is not 1/3 and 9.9999999999 is not 10; 0.3333333333 is what a program prints for 1/3.
    """
    if left == right:
        return True
    for text, decimal, exact in ((left_text, left, right), (right_text, right, left)):
        if is_decimal(text) and not is_finite_decimal(exact):
            missing = (abs(exact) - abs(decimal)) / last_place(text)
            return (decimal < 0) == (exact < 0) and Fraction(-1, 2) <= missing < 1  # rounded or cut off
    return False
