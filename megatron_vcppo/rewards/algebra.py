r"""Whether two mathematical objects are the same: read by math-verify, compared without rounding.

math-verify reads the LaTeX and has the last word on what has no value (relations of several unknowns, functions that
nobody defined). What has values is compared by them (evaluate_expression.py), sets and intervals part by part.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.logic import And
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.grader import is_assignment_relation
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from megatron_vcppo.rewards.evaluate_expression import (
    POINTS,
    TOLERANCE,
    TooLarge,
    Tree,
    agree,
    at_point,
    plain,
    value_of,
)
from megatron_vcppo.rewards.notation import for_library

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs (SIGALRM) are off

_CONFIG = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last", equations=False
        ),
    ),
)
_MAX_LENGTH = 1000
_MAX_BRACKETS, _MAX_BRACES = 8, 24
"""Nested brackets take the library seconds each."""


@lru_cache(maxsize=512)
def read(text: str) -> Tree | None:
    """What math-verify makes of a tidy answer; None if it cannot read it, or only with an effort."""
    if len(text) > _MAX_LENGTH or _depth(text, "([", ")]") > _MAX_BRACKETS or _depth(text, "{", "}") > _MAX_BRACES:
        return None
    if re.search(r"\\(?:binom|Gamma|gamma|det|operatorname)\b", text) and re.search(r"\d{5}", text):
        return None  # these are evaluated while they are read
    try:
        found = parse(
            rf"\boxed{{{for_library(text)}}}",
            _CONFIG,
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        tree = found[0] if found else None
        return None if isinstance(tree, str) else tree
    except (RecursionError, ArithmeticError, ValueError, TypeError, AttributeError):
        return None


def same(gold: Tree, given: Tree) -> bool:
    """Whether the given object is the gold one. Raises TooLarge if that cannot be decided with bounded work."""
    gold, given = _simplified_relation(gold), _simplified_relation(given)
    gold_name, given_name = assigned_name(gold), assigned_name(given)
    if gold_name and given_name and _same_name(gold_name, given_name):
        gold, given = gold.rhs, given.rhs
    elif given_name and not isinstance(gold, sympy.Eq):
        given = given.rhs
    elif gold_name and not isinstance(given, sympy.Eq):
        gold = gold.rhs
    if isinstance(gold, sympy.Eq) or isinstance(given, sympy.Eq):
        both = isinstance(gold, sympy.Eq) and isinstance(given, sympy.Eq)
        return both and _same_equation(gold, given)
    for left, right in ((gold, given), (given, gold)):
        if (entries := vector(left)) is not None and (others := vector(right)) is not None:
            return len(entries) == len(others) and all(map(same, entries, others))
        if is_set(left) or _is_inequality(left):
            return _same_set(gold, given)
    if _is_matrix(gold) or _is_matrix(given):
        return _same_matrix(gold, given)
    if isinstance(gold, sympy.Tuple) or isinstance(given, sympy.Tuple):
        return False
    return _same_value(gold, given)


def same_list(gold: Sequence[Tree], given: Sequence[Tree]) -> bool:
    """Whether lists without brackets are the same: in any order, unless the parts have names or one is a tuple."""
    if len(gold) == 1 and len(given) == 1:
        return same(gold[0], given[0])
    for one, other, many in ((gold, gold[0], given), (given, given[0], gold)):
        if len(one) > 1:
            continue
        other = other.rhs if assigned_name(other) else other
        if isinstance(other, sympy.FiniteSet):
            return _covers(tuple(other.args), many) and _covers(many, tuple(other.args))
        if (entries := vector(other)) is not None:
            return _in_order(entries, by_name(many) or many)
    if len(gold) > 1 and len(set(gold)) == len(gold):
        given = list(dict.fromkeys(given))
    if len(gold) == len(given) > 1:
        gold_named, given_named = by_name(gold), by_name(given)
        if bool(gold_named) == bool(given_named):
            return _match(gold, given)
        as_written = [part.rhs for part in gold] if gold_named else []
        return _in_order(gold_named or gold, given_named or given) or _in_order(as_written, given)
    if all(_is_region(part) for part in (*gold, *given)):
        return _same_set(union(gold), union(given))
    return False


def union(parts: Iterable[Tree]) -> Tree:
    """The union of sets, intervals and inequalities of one unknown."""
    return sympy.Union(*(as_set(part) for part in parts))


def intersection(parts: Iterable[Tree]) -> Tree:
    """The intersection of sets, intervals and inequalities of one unknown."""
    return sympy.Intersection(*(as_set(part) for part in parts))


def as_set(tree: Tree) -> Tree:
    """A set, or the numbers that an inequality of one unknown allows. Raises ValueError for anything else."""
    if assigned_name(tree):
        tree = tree.rhs
    tree = plain(tree)
    if isinstance(tree, sympy.Set):
        return tree
    functions = tree.atoms(AppliedUndef)
    tree = tree.xreplace({function: sympy.Symbol(str(function.func)) for function in functions})
    if not _is_inequality(tree) or len(tree.free_symbols) != 1:
        raise ValueError(f"no set: {tree}")
    name = tree.free_symbols.pop()
    return tree.xreplace({name: sympy.Symbol("x", real=True)}).as_set()


def is_set(tree: Tree) -> bool:
    """A set or an interval."""
    return isinstance(tree, sympy.Set)


def assigned_name(tree: Tree) -> str:
    r"""The left side of x = 5, f(x) = 2x, x \in S as text; "" if the tree is not of that form."""
    if isinstance(tree, sympy.Eq) and is_assignment_relation(tree) and not tree.lhs.has(sympy.Add):
        return str(tree.lhs)
    return ""


def vector(tree: Tree) -> tuple[Tree, ...] | None:
    """The entries of a tuple, of a point written as an open interval, or of a row or column; None for others."""
    if isinstance(tree, sympy.Tuple):
        return tuple(tree.args)
    if isinstance(tree, sympy.Interval) and tree.left_open and tree.right_open:
        return (tree.start, tree.end)
    if isinstance(tree, AppliedUndef) and len(tree.args) > 1 and str(tree.func).isupper() and str(tree.func) != "C":
        return tuple(tree.args)  # a point with its name: A(1, 2)
    if isinstance(tree, sympy.MatrixBase) and 1 in tree.shape:
        return tuple(tree)
    return None


def _depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for letter in text:
        depth += (letter in opening) - (letter in closing)
        deepest = max(deepest, depth)
    return deepest


def _same_value(gold: Tree, given: Tree) -> bool:
    left, right = plain(gold), plain(given)
    if left == right:
        return left not in (sympy.nan, sympy.zoo)
    if left.is_Rational and right.is_Rational:
        return False
    agreed = agree(left, right)
    if agreed is not None:
        return agreed
    return bool(verify(left, right, timeout_seconds=None))


def _simplified_relation(tree: Tree) -> Tree:
    """x = a = b as x = b; 3 = x as x = 3; others as they are."""
    if isinstance(tree, And) and all(isinstance(part, sympy.Eq) for part in tree._unsorted_args):
        parts = tree._unsorted_args
        tree = sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
    if isinstance(tree, sympy.Eq) and not assigned_name(tree):
        turned = sympy.Eq(tree.rhs, tree.lhs, evaluate=False)
        if assigned_name(turned):
            return turned
    return tree


def _same_name(left: str, right: str) -> bool:
    """The same unknown; y may stand for any f(x)."""
    functions = [name == "y" or re.fullmatch(r"[a-z]\([a-z]\)", name, re.IGNORECASE) for name in (left, right)]
    return left == right or all(functions)


def _same_equation(gold: Tree, given: Tree) -> bool:
    """Whether both hold for the same numbers: their differences are multiples of each other."""
    try:
        differences = [plain(tree.lhs) - plain(tree.rhs) for tree in (gold, given)]
        quotient = differences[0] / differences[1]
    except (TypeError, AttributeError):
        return bool(verify(gold, given, timeout_seconds=None))
    names = sorted(differences[0].free_symbols | differences[1].free_symbols, key=str)
    if differences[0].free_symbols != differences[1].free_symbols:
        return False
    found = [value_of(quotient, at_point(names, point)) for point in POINTS]
    ratios = [ratio for ratio in found if ratio is not None and ratio != 0]
    if len(ratios) < 2:
        return bool(verify(gold, given, timeout_seconds=None))
    return all(abs(ratio - ratios[0]) <= TOLERANCE * abs(ratios[0]) for ratio in ratios)


def _is_inequality(tree: Tree) -> bool:
    if isinstance(tree, sympy.And | sympy.Or):
        return all(_is_inequality(part) for part in tree.args)
    return isinstance(tree, Relational) and not isinstance(tree, sympy.Eq)


def _is_region(tree: Tree) -> bool:
    return is_set(tree.rhs if assigned_name(tree) else tree) or _is_inequality(tree)


def _is_matrix(tree: Tree) -> bool:
    return isinstance(tree, sympy.MatrixBase | sympy.MatrixExpr)


def _same_set(gold: Tree, given: Tree) -> bool:
    try:
        left, right = (as_set(tree) if _is_region(tree) else sympy.FiniteSet(plain(tree)) for tree in (gold, given))
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        if isinstance(error, TooLarge):
            raise
        return bool(verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True))
    return left == right or _match(_pieces(left), _pieces(right), _same_piece)


def _pieces(tree: Tree) -> list[Tree]:
    """Intervals, points and other sets whose union the set is."""
    if isinstance(tree, sympy.Complement):
        tree = sympy.Complement(*tree.args)
    parts = tree.args if isinstance(tree, sympy.Union) else (tree,)
    return [piece for part in parts for piece in (part.args if isinstance(part, sympy.FiniteSet) else (part,))]


def _same_piece(left: Tree, right: Tree) -> bool:
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        open_alike = (left.left_open, left.right_open) == (right.left_open, right.right_open)
        return open_alike and same(left.start, right.start) and same(left.end, right.end)
    if isinstance(left, sympy.Set) or isinstance(right, sympy.Set):
        return bool(left == right)
    return same(left, right)


def _same_matrix(gold: Tree, given: Tree) -> bool:
    left, right = plain(gold), plain(given)
    if not (isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase)):
        return bool(_is_matrix(left) and _is_matrix(right) and verify(left, right, timeout_seconds=None))
    return left.shape == right.shape and all(map(same, left, right))


def by_name(parts: Sequence[Tree]) -> list[Tree]:
    """The right sides of x = 1, y = 2 in the order of the names; empty unless all have names that differ."""
    names = [assigned_name(part) for part in parts]
    if "" in names or len({re.sub(r"_.*", "", name) for name in names}) < len(names):
        return []
    return [part.rhs for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])]


def _in_order(parts: Sequence[Tree], others: Sequence[Tree]) -> bool:
    return len(parts) == len(others) and all(map(same, parts, others))


def _covers(parts: Sequence[Tree], others: Sequence[Tree]) -> bool:
    return all(any(same(part, other) for other in others) for part in parts)


def _match(left: Sequence[Tree], right: Sequence[Tree], equal: Any = same) -> bool:
    """Whether the parts are the same in some order."""
    rest = list(right)
    for part in left:
        found = next((i for i, other in enumerate(rest) if equal(part, other)), None)
        if found is None:
            return False
        del rest[found]
    return not rest
