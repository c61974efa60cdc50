"""The allowed range of a number, written next to its key.

Examples: ``lr: NonNegativeFloat = 1e-6``, ``beta1: Annotated[float, Range("[0, 1)")] = 0.9``.
"""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """An interval in standard notation; ``Range("[0, 1)")`` is 0 <= x < 1.

    Infinite ends are open, so infinities and NaN are in no range.
    """

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = map(float, self.text[1:-1].split(","))
        above = value >= low if self.text.startswith("[") else value > low
        below = value <= high if self.text.endswith("]") else value < high
        return above and below


PositiveInt = Annotated[int, Range("[1, inf)")]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
Fraction = Annotated[float, Range("[0, 1]")]
PositiveFraction = Annotated[float, Range("(0, 1]")]
FiniteFloat = Annotated[float, Range("(-inf, inf)")]


def range_of(annotation: Any) -> Range | None:
    """The range of a type ``Annotated[number, Range(…)]``; None for other types."""
    return next((part for part in typing.get_args(annotation)[1:] if isinstance(part, Range)), None)


def out_of_range(name: str, annotation: Any, value: Any) -> Iterator[tuple[str, Range, float]]:
    """(dotted name, allowed range, value) of every number in ``value`` that its type does not allow.

    Covers optional numbers, lists (``name[0]``) and values of dictionaries (``name.key``).
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if value is None:
        return
    if allowed := range_of(annotation):
        if value not in allowed:
            yield name, allowed, value
    elif origin in (typing.Union, UnionType):
        for argument in arguments:
            yield from out_of_range(name, argument, value)
    elif origin is list:
        for index, item in enumerate(value):
            yield from out_of_range(f"{name}[{index}]", arguments[0], item)
    elif origin is dict:
        for key, item in value.items():
            yield from out_of_range(f"{name}.{key}", arguments[1], item)
