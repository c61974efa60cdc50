"""What a sample has under a key: nested names, several names, numbers, and null."""

import json
import math
from decimal import Decimal
from typing import Any

from megatron_vcppo.data.bad_samples import BadSample
from megatron_vcppo.data.readers import Row, Sample

_ABSENT = object()


def find(row: Row, key: str) -> Any:
    """The value under a key; None if the row has none, or null.

    key: a name (``answer``), a path of names and of places in lists (``reward_model.ground_truth``,
    ``1.ground_truth.value``), or several of these with ``|`` between them, of which the first that has a value counts.
    A name that has dots or bars itself is found as it is.
    """
    found = _find(row, key)
    return None if found is _ABSENT else found


def require(sample: Sample, keys: list[str]) -> list[Any]:
    """The values of these keys. Raises BadSample if the sample was not readable, or lacks one or has null there."""
    if sample.value is None:
        raise BadSample("malformed", sample.problem)
    values = []
    for key in keys:
        value = _find(sample.value, key)
        if value is _ABSENT:
            raise BadSample("missing key", f"{key!r}; it has {_described(sample.value)}")
        if value is None:
            raise BadSample("null", f"{key!r} is null")
        values.append(value)
    return values


def answer_text(value: Any, key: str) -> str:
    """An answer as text: text as it is, numbers as they are written (7, 0.5), anything else as JSON.

    A whole number that a table holds as a float (7.0) is written without the point. Raises BadSample that names ``key``
    for what is no answer: not a number, infinite, blank, or without a form in JSON.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadSample("malformed answer", f"{key!r} is {value}")
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    if isinstance(value, str):
        if not value.strip():
            raise BadSample("malformed answer", f"{key!r} is blank")
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise BadSample("malformed answer", f"{key!r} is a {kind}, not text, a number or JSON") from None


def _find(row: Row, key: str) -> Any:
    if isinstance(row, dict) and key in row:
        return row[key]
    found: Any = _ABSENT
    for path in key.split("|"):
        value = _follow(row, path.strip())
        if value is not None and value is not _ABSENT:
            return value
        found = value if found is _ABSENT else found
    return found


def _follow(value: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _ABSENT
    return value


def _described(row: Row) -> str:
    if isinstance(row, list):
        return f"a list of {len(row)}"
    return ", ".join(row) or "no keys"
