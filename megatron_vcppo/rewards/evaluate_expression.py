r"""The values of expressions, exactly or to 40 digits, with a bound on the work.

math-verify compares constants with a rounding (it takes 1/2^99 for 1/2^98) and expressions with sympy's simplify, which
may take minutes. Here constants agree to 25 digits, and expressions have the same values at a few fixed points.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.logic import And
from sympy.core.function import AppliedUndef

_EXACT_DIGITS = 4000
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
_MAX_BITS = 1 << 18
_MAX_NODES = 2000
_MAX_TERMS = 3000
_DIGITS = 40
TOLERANCE = sympy.Float("1e-25", _DIGITS)
_ZERO = sympy.Float("1e-80", _DIGITS)
POINTS = tuple(
    tuple(map(sympy.Rational, values))
    for values in (
        ("1.7310585", "0.2689414", "2.3978953", "1.1472091"),
        ("-0.6137056", "1.7080502", "-1.5596158", "0.8646647"),
        ("0.4054651", "-2.1972246", "0.5108256", "-1.3862944"),
        ("5", "3", "7", "4"),
        ("4", "7", "6", "3"),
        ("2", "5", "4", "9"),
    )
)
Tree = Any
"""A sympy object: expression, relation, set, tuple or matrix."""


def rational(text: str) -> Fraction | None:
    r"""The value of an integer, decimal, a/b, ``\frac{a}{b}`` or mixed number; None for anything else."""
    match = _NUMBER.fullmatch(text) if len(text) <= _EXACT_DIGITS else None
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
    return "." in text and digits.isdigit() and _ROUNDED <= len(digits.strip("0")) <= _EXACT_DIGITS


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


class TooLarge(ValueError):
    """Evaluating this would take more time or memory than an answer is worth."""


def plain(tree: Tree) -> Tree:
    """Evaluated exactly: decimals as fractions, the letter i as the imaginary unit, sums added up, real odd roots.

    Raises TooLarge before it evaluates what would be.
    """
    if sum(1 for _ in sympy.preorder_traversal(tree)) > _MAX_NODES or _bits(tree) > _MAX_BITS:
        raise TooLarge(f"{type(tree).__name__} with large numbers")
    return _plain(tree, frozenset())


def _plain(tree: Tree, bound: frozenset[str]) -> Tree:
    if isinstance(tree, sympy.Symbol):
        return sympy.I if tree.name == "i" and "i" not in bound else sympy.Symbol(tree.name)
    if isinstance(tree, sympy.Float):
        return sympy.Rational(str(tree))
    if isinstance(tree, sympy.MatrixBase):
        return tree.applyfunc(lambda entry: _plain(entry, bound))
    if not getattr(tree, "args", ()):
        return tree
    if isinstance(tree, sympy.Sum | sympy.Product):
        bound |= {str(limit[0]) for limit in tree.limits}
    args = [_plain(arg, bound) for arg in tree.args]
    if isinstance(tree, sympy.UnevaluatedExpr):
        return args[0]
    if isinstance(tree, sympy.Pow) and args[1].is_Rational and args[1].q % 2 and args[1].q > 1 and args[0].is_negative:
        return (-1) ** (args[1].p % 2) * sympy.Pow(-args[0], args[1])  # \sqrt[3]{-8} is -2
    if isinstance(tree, AppliedUndef) and str(tree.func) == "C" and len(args) == 2:
        return sympy.binomial(*args)
    if isinstance(tree, sympy.FiniteSet):
        return sympy.FiniteSet(*args)
    if isinstance(tree, And):
        return sympy.And(*args)
    result = tree.func(*args)
    return result.doit() if isinstance(result, sympy.Sum | sympy.Product | sympy.MatAdd | sympy.MatMul) else result


def _bits(tree: Tree) -> float:
    """How long the numbers may become, in bits, when the tree is evaluated, also at the points: an upper estimate."""
    if isinstance(tree, sympy.Integer):
        return float(abs(int(tree)).bit_length())
    if isinstance(tree, sympy.Rational):
        return float(max(abs(int(tree.p)).bit_length(), int(tree.q).bit_length()))
    if isinstance(tree, sympy.Float):
        return 64.0 + len(str(tree)) * 4
    if isinstance(tree, sympy.MatrixBase):
        return max(map(_bits, tree), default=0.0)
    if not getattr(tree, "args", ()):
        return 4.0
    if isinstance(tree, sympy.Pow) and isinstance(tree.exp, sympy.Number):
        return _bits(tree.base) * float(min(abs(tree.exp) + 1, 2 * _MAX_BITS))
    inner = [_bits(arg) for arg in tree.args]
    largest = max(inner)
    if isinstance(tree, sympy.Pow):
        return inner[0] * 2.0 ** min(inner[1], 64.0)
    if isinstance(tree, (sympy.factorial, sympy.binomial, sympy.gamma, sympy.exp, AppliedUndef)):
        return largest * 2.0 ** min(largest, 64.0)
    if isinstance(tree, sympy.Sum | sympy.Product):
        ranges = [limit[2] - limit[1] for limit in tree.limits]
        if any(terms.is_Integer and terms > _MAX_TERMS for terms in ranges):
            return float("inf")
        terms = max((int(terms) for terms in ranges if terms.is_Integer), default=1)
        return _bits(tree.function) * (terms if isinstance(tree, sympy.Product) else 1)
    if isinstance(tree, sympy.Mul):
        return sum(inner)
    return largest + len(inner)


def agree(left: Tree, right: Tree) -> bool | None:
    """Whether two expressions have the same values; None if too few of the points give one."""
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return None
    if left.has(AppliedUndef) or right.has(AppliedUndef):
        return None
    names = sorted(left.free_symbols | right.free_symbols, key=str)
    complex_valued = left.has(sympy.I) or right.has(sympy.I)
    agreed = 0
    for point in POINTS if names else POINTS[:1]:
        one, other = (value_of(tree, at_point(names, point)) for tree in (left, right))
        if one is None or other is None:
            continue
        if names and not complex_valued and not (one.is_real and other.is_real):
            continue  # real roots and logarithms have their own domains
        scale = max(abs(one), abs(other))
        if scale > _ZERO and abs(one - other) > TOLERANCE * scale:
            return False
        agreed += 1
    return True if agreed >= (2 if names else 1) else None


def at_point(names: Sequence[Tree], point: Sequence[Tree]) -> dict[Tree, Tree]:
    """A value for every name, all of them different."""
    return {name: point[i % len(point)] + i // len(point) * sympy.Rational(3, 7) for i, name in enumerate(names)}


def value_of(tree: Tree, values: dict[Tree, Tree]) -> Tree | None:
    """A finite complex number of 40 digits, or None."""
    try:
        value = (tree.xreplace(values) if values else tree).evalf(_DIGITS)
    except (ArithmeticError, ValueError, TypeError, AttributeError):
        return None
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or value.atoms(sympy.Function):
        return None
    real, imaginary = value.as_real_imag()
    return real if abs(imaginary) <= TOLERANCE * abs(real) else value
