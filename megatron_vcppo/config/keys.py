"""Every configuration key with its type, range, default and text, read from the dataclasses and their source;
the names that keys had in earlier versions."""

import ast
import copy
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_vcppo.config.ranges import range_of
from megatron_vcppo.config.schema import Config

PLAIN_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    Any: "any value",
}
RENAMED = {
    "ppo.skip_limit": "run.skip_limit",
    "ppo.advantage.gamma": "returns.gamma",
    "ppo.advantage.overlong_penalty_tokens": "returns.overlong_penalty_tokens",
    "ppo.advantage.overlong_filter": "returns.overlong_filter",
    "ppo.critic.bounds": "values.bounds",
    "ppo.critic.huber_delta": "values.huber_delta",
    "reward_model.cut_share": "reward_model.truncated_share",
}
"""Old name → new name; the value is taken."""
REMOVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "rollout.interface": (("lo",), "engines use cluster.network_interface, as everything else does; remove this line"),
    "run.check_numerics": ((True, False), "PPO always checks; remove this line"),
}
"""Old name → the values that are ignored, because stored configurations hold them, and advice for any other value."""
BEFORE = {"prompts.apply_chat_template": False, "run.access": "as_is"}
"""Key → what runs did that were made before there was the key, where its default would change them."""


@dataclass(frozen=True)
class Key:
    """One leaf of the configuration."""

    name: str
    """Dotted, as on the command line: ``sft.optimizer.lr``."""
    annotation: Any
    default: Any
    doc: str

    @property
    def type_text(self) -> str:
        """Type and range as a user reads them: ``a whole number in [1, inf) or null``, ``constant | cosine``."""
        return _type_text(self.annotation)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; empty if every value of the type is allowed."""
        return _choices(self.annotation)

    @property
    def choices_of_items(self) -> tuple[str, ...]:
        """The same of the items of a list."""
        return _choices(*typing.get_args(self.annotation))


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every leaf by its dotted name, in the order of the dataclasses."""
    return {key.name: key for key in _leaves(Config(), "")}


@functools.cache
def all_sections() -> dict[str, str]:
    """Every section by its dotted name, with its text."""
    return dict(_sections(Config(), ""))


def nearest_key(unknown: str) -> str | None:
    """The closest known key or section by spelling, else one with the same last part; None if there is neither."""
    known = [*all_keys(), *all_sections()]
    if near := difflib.get_close_matches(unknown, known, n=1, cutoff=0.75):
        return near[0]
    last = unknown.rpartition(".")[2]
    namesakes = [name for name in known if name.rpartition(".")[2] == last]
    if namesakes:
        return max(namesakes, key=lambda name: difflib.SequenceMatcher(None, unknown, name).ratio())
    return next(iter(difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)), None)


def _leaves(section: Any, prefix: str) -> Iterator[Key]:
    hints, docs = typing.get_type_hints(type(section), include_extras=True), _field_docs(type(section))
    for field in fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield Key(name, hints[field.name], value, docs.get(field.name, ""))


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield prefix + field.name, inspect.getdoc(type(value)) or ""
            yield from _sections(value, f"{prefix}{field.name}.")


def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, from the source, because Python does not keep it."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs = {}
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _choices(annotation: Any) -> tuple[str, ...]:
    options = [option for option in (annotation, *typing.get_args(annotation)) if _is_literal(option)]
    return tuple(map(str, typing.get_args(options[0]))) if options else ()


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _plural(annotation: Any) -> str:
    text = _type_text(annotation)
    for one, several in (("a whole number", "whole numbers"), ("a number", "numbers"), ("any value", "any values")):
        text = text.replace(one, several)
    return text


def _type_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if allowed := range_of(annotation):
        return f"{_type_text(arguments[0])} in {allowed.text}"
    if _is_literal(annotation):
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a map from {_type_text(arguments[0])} to {_plural(arguments[1])}"
    return PLAIN_TYPES.get(annotation, str(annotation))


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values of a stored configuration under the present names, without removed keys."""
    renamed = copy.deepcopy(dict(values))
    for old in (*RENAMED, *REMOVED):
        *sections, key = old.split(".")
        holder: Any = renamed
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or key not in holder:
            continue
        value = holder.pop(key)
        if old in RENAMED:
            section, name = RENAMED[old].split(".")
            renamed.setdefault(section, {}).setdefault(name, value)
    return renamed
