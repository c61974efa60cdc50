"""Comparing what a program printed or returned with what is expected."""

import pytest

from megatron_vcppo.rewards.code_compare import CHECKERS, same_tokens
from megatron_vcppo.rewards.sandbox.inside.plain import decode, encode, same


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ("1 2\n3\n", "1 2 3", True),
        (" 1  2 \r\n3", "1 2\n3\n\n", True),
        ("1 2", "1 2 3", False),
        ("1 2 3", "1 2", False),
        ("YES", "Yes", False),
        ("3.0", "3", True),
        ("3", "3.0", True),
        ("+7", "7", True),
        ("3.0000001", "3", False),
        ("0.3333333333", "0.333333", True),
        ("0.333", "0.3333333", False),
        ("1e-9", "0.0", True),
        ("1e5", "100000.0", True),
        ("100000000.5", "100000000.4", True),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1e400", False),
        ("1e9999", "1.0", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("1_0", "10", False),
        ("１", "1", False),
        ("", "", True),
        ("x", "", False),
    ],
)
def test_tokens(given: str, expected: str, equal: bool) -> None:
    assert same_tokens(given, expected) is equal


def test_long_outputs_are_compared_in_linear_time() -> None:
    """A quadratic comparison of these takes longer than any test may."""
    assert not same_tokens("9" * 5_000_000, "9" * 4_999_999 + ".0")
    assert same_tokens("1 " * 300_000, "1.0 " * 300_000)
    assert not same_tokens("1e9999 " * 1000, "2.0 " * 1000)


@pytest.mark.parametrize(
    ("name", "given", "expected", "right"),
    [
        ("lines", "1 2\n3", "1 2\n3\n", True),
        ("lines", "1 2 3", "1 2\n3\n", False),
        ("exact", "1  2\n", "1  2", True),
        ("exact", "1 2\n", "1  2", False),
        ("ignore_case", "yes", "YES", True),
        ("unordered_lines", "b 2\na 1", "a 1\nb 2\n", True),
        ("unordered_lines", "b 1\na 2", "a 1\nb 2\n", False),
        ("unordered_lines", "a\na\nb", "a\nb\nb", False),
        ("unordered_tokens", "3 1 2", "1 2 3", True),
        ("unordered_tokens", "3 1 1", "1 3 3", False),
    ],
)
def test_checkers(name: str, given: str, expected: str, right: bool) -> None:
    assert CHECKERS[name]("", expected, given) is right


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ((1, 2), [1, 2], True),
        ([1, [2, (3,)]], [1, [2, [3]]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0, True),
        (9.9999999999, 10, False),
        (10**400, 1.5, False),
        ({1: "a"}, {"1": "a"}, True),
        ({1: "a", "1": "b"}, {"1": "a"}, False),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (None, None, True),
        (None, False, False),
        ({1, 2}, [1, 2], False),
        (float("nan"), 1.0, False),
    ],
)
def test_values(given: object, expected: object, equal: bool) -> None:
    assert same(given, expected) is equal


def refuse(*what: object) -> dict:
    raise ValueError(what)


def test_values_survive_the_way_out() -> None:
    from collections import deque
    from decimal import Decimal
    from fractions import Fraction

    values: list[object] = [
        None,
        True,
        -(2**4000),
        1.5,
        float("inf"),
        "\ud800\0",
        b"\xff",
        bytearray(b"x"),
        (1, (2,)),
        {3},
        [[]],
    ]
    values += [frozenset({1}), {(1, 2): {"a": [1]}}, 1 + 2j, Fraction(1, 3), Decimal("0.10"), deque([1])]
    for value in values:
        found = decode(encode(value, refuse), refuse, arrays=True)
        assert found == value and type(found) is type(value)
    assert decode(encode([range(3), {"a": 1}.keys()], refuse), refuse) == [[0, 1, 2], ["a"]]


def test_values_lose_their_methods_on_the_way_out() -> None:
    class Yes(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __add__(self, other: object) -> "Yes":
            return self

        __hash__ = int.__hash__

    for value in (Yes(3), [Yes(3)], {Yes(3): Yes(3)}):
        assert decode(encode(value, refuse), refuse) != 4
    assert type(decode(encode(Yes(3), refuse), refuse)) is int


@pytest.mark.parametrize(
    "data",
    [{}, {"t": 1}, {"t": [1], "s": []}, {"i": 5}, {"i": "zz"}, {"q": [1, 0]}, {"s": [[1]]}, {"d": [1]}, {"o": 3}],
)
def test_data_that_no_value_makes_are_refused(data: object) -> None:
    with pytest.raises(ValueError):
        decode(data, refuse)
