"""Values as plain data: what a program returns is judged by what it is made of, never by its own methods.

A value becomes JSON: null, booleans, numbers, text and lists are themselves, everything else is an object with one key
that names its kind: ``{"t": [1, 2]}`` is a tuple. What is neither is refused, or passed by reference (``{"o": 3}``).
"""

import math
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Refer = Callable[[Any], dict[str, Any]]
"""Gives the data that stands for a value that is not plain; raises TypeError if it may not be passed."""
Resolve = Callable[[str, Any], Any]
"""The value that such data stands for, given key and content; raises ValueError if there is none."""

_VIEWS: tuple[type[Iterable[Any]], ...] = (range, type({}.keys()), type({}.values()), type({}.items()))
_PLAIN_BITS = 1024  # larger integers are written in hexadecimal, which takes time in proportion to their length


def encode(value: Any, refer: Refer) -> Any:
    """JSON for a value; subclasses of the built-in types lose what they added to them. Raises RecursionError."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__add__(value, 0)
        return number if number.bit_length() <= _PLAIN_BITS else {"i": hex(number)}
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return {"d": [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]}
    if isinstance(value, tuple):
        return {"t": [encode(item, refer) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"s": [encode(item, refer) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"f": [encode(item, refer) for item in frozenset.__iter__(value)]}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "y": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, Fraction):
        return {"q": [encode(value.numerator, refer), encode(value.denominator, refer)]}
    if isinstance(value, Decimal):
        return {"D": Decimal.__str__(value)}
    return _encode_library(value, refer)


def _encode_library(value: Any, refer: Refer) -> Any:
    """Views, ranges and deques as the lists that they stand for; arrays and scalars of numpy, where it is loaded."""
    if isinstance(value, _VIEWS):
        return [encode(item, refer) for item in value]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        return {"a": [str(value.dtype), encode(value.tolist(), refer)]}
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item(), refer)
    if type(value).__module__ == "collections" and type(value).__name__ == "deque":
        return {"Q": [encode(item, refer) for item in value]}
    return refer(value)


def decode(data: Any, resolve: Resolve, arrays: bool = False) -> Any:
    """The value of JSON that ``encode`` made, of built-in types only; arrays: numpy arrays as such, not as lists.

    Raises ValueError if the data are no such thing.
    """
    if data is None or isinstance(data, bool | str | int | float):
        return data
    if isinstance(data, list):
        return [decode(item, resolve, arrays) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("a value is not in the form that is agreed on")
    (kind, content), *_ = data.items()
    if kind not in _DECODERS:
        return resolve(kind, content)
    try:
        return _DECODERS[kind](content, lambda item: decode(item, resolve, arrays), arrays)
    except (TypeError, ArithmeticError, AttributeError, UnicodeError) as error:
        raise ValueError(f"a value is not in the form that is agreed on: {kind}") from error


def _array(content: Any, item: Callable[[Any], Any], arrays: bool) -> Any:
    kind, values = content
    if not arrays:
        return item(values)
    import numpy

    return numpy.array(item(values), dtype=numpy.dtype(str(kind)))


def _deque(content: Any, item: Callable[[Any], Any], arrays: bool) -> Any:
    from collections import deque

    return deque(map(item, content)) if arrays else [*map(item, content)]


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any], bool], Any]] = {
    "i": lambda content, item, _: int(content, 16),
    "t": lambda content, item, _: tuple(map(item, content)),
    "s": lambda content, item, _: set(map(item, content)),
    "f": lambda content, item, _: frozenset(map(item, content)),
    "d": lambda content, item, _: {item(key): item(value) for key, value in content},
    "b": lambda content, item, _: content.encode("latin-1"),
    "y": lambda content, item, _: bytearray(content.encode("latin-1")),
    "c": lambda content, item, _: complex(*content),
    "q": lambda content, item, _: Fraction(item(content[0]), item(content[1])),
    "D": lambda content, item, _: Decimal(content),
    "a": _array,
    "Q": _deque,
}


def same(given: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """Whether two plain values are equal: tuples count as lists, floats may differ by the tolerance, relative or
    absolute, where a float is expected."""
    if isinstance(expected, float) and isinstance(given, int | float) and not isinstance(given, bool):
        try:
            return given == expected or math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:  # an integer beyond all floats
            return False
    if isinstance(expected, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(given) == len(expected)
            and all(same(a, b, tolerance) for a, b in zip(given, expected))
        )
    if isinstance(expected, dict):
        if not isinstance(given, dict) or len(given) != len(expected):
            return False
        # The keys of JSON are text; those of a program may be numbers.
        named = {key if isinstance(key, str) else str(key): value for key, value in given.items()}
        return len(named) == len(expected) and all(
            str(key) in named and same(named[str(key)], value, tolerance) for key, value in expected.items()
        )
    return bool(given == expected)
