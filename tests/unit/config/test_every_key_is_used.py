"""Every key is set by a test or by a shipped file: a key that nothing sets is not known to work."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

import megatron_vcppo.config
from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.value_sources import CONFIGS

TESTS = Path(__file__).parents[2]
HELPERS = sorted((TESTS.parent / "tools" / "benchmarks").glob("_*.py"))
"""What tests and benchmarks share."""
OVERRIDE = re.compile(r"(\w+(?:\.\w+)+)=")

Setting = tuple[str, str]
"""(what stands before a key: a section, a variable or a section's class; the key)."""


def set_in_yaml(tree: Any, section: str = "") -> Iterator[Setting]:
    for key, value in tree.items() if isinstance(tree, dict) else []:
        yield section, str(key)
        yield from set_in_yaml(value, key)


def set_in_python(tree: ast.AST) -> Iterator[Setting]:
    """Assigned attributes, entries of dictionaries, arguments of sections' classes, and overrides in text."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=key, ctx=ast.Store()):
                yield getattr(owner, "attr", getattr(owner, "id", "")), key
            case ast.Dict(keys=keys, values=values):
                for name, value in zip(keys, values, strict=True):
                    yield from entries(name.value if isinstance(name, ast.Constant) else "", value)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AugAssign(target=ast.Name(id=name), value=value)
                | ast.keyword(arg=str(name), value=value)
            ):
                yield from entries(name, value)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
                section = getattr(megatron_vcppo.config, name, None)
                if is_dataclass(section):
                    in_order = [field.name for field in fields(section)][: len(arguments)]
                    yield from ((name, key) for key in [*in_order, *(word.arg or "" for word in keywords)])
            case ast.Constant(value=str(text)):
                for dotted in OVERRIDE.findall(text):
                    yield setting_of(dotted)


def entries(name: Any, value: ast.AST) -> Iterator[Setting]:
    for inner in value.keys if isinstance(value, ast.Dict) else []:
        if isinstance(inner, ast.Constant):
            yield str(name), str(inner.value)


def setting_of(dotted: str) -> Setting:
    section, _, key = dotted.rpartition(".")
    return section.rpartition(".")[2], key


def class_of(dotted: str) -> str:
    """Name of the class that holds a key; ``optimizer.lr`` of two stages is one key of one class."""
    holder: Any = megatron_vcppo.config.Config()
    for part in dotted.split(".")[:-1]:
        holder = getattr(holder, part)
    return type(holder).__name__


def test_every_key_is_set_by_a_test_or_a_shipped_file() -> None:
    found: set[Setting] = set()
    for path in CONFIGS.rglob("*.yaml"):
        found |= set(set_in_yaml(yaml.safe_load(path.read_text(encoding="utf-8"))))
    for path in [*TESTS.rglob("*.py"), *HELPERS]:
        found |= set(set_in_python(ast.parse(path.read_text(encoding="utf-8"))))
    keys = {name: (class_of(name), setting_of(name)) for name in all_keys()}
    holders = {key: {holder for holder, (_, other) in keys.values() if other == key} for _, (_, key) in keys.values()}
    named = {key for _, key in found if len(holders.get(key, ())) == 1}  # in one class only: any owner will do
    used = {
        (holder, key)
        for holder, (section, key) in keys.values()
        if key in named or {(section, key), (holder, key)} & found
    }
    assert not [name for name, (holder, (_, key)) in keys.items() if (holder, key) not in used]
