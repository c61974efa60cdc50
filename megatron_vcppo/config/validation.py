"""Checks of a whole configuration: required keys, allowed ranges, then the rules between keys."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.ranges import out_of_range
from megatron_vcppo.config.rules import RULES, STAGE_RULES
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.stage_overrides import overridden_stages, override_problems
from megatron_vcppo.errors import UserError

READ_BY = {"sft": {"sft"}, "prompts": {"reward_model", "value_pretrain", "ppo"}}
"""Sections whose required keys must be set only if one of these stages is in the chain."""


def check_config(config: Config, complete: bool = True, place: Callable[[str], str] = lambda key: "") -> None:
    """Raise UserError with every problem found.

    Args:
        config: all values.
        complete: False checks only the ranges, for a part of a configuration.
        place: prefix of a message about a key, such as ``my.yaml:3: ``, or about all of them for the key "".
    """
    found = [(name, f"{name} must be in {allowed.text}, got {value}") for name, allowed, value in _outside(config)]
    if complete:
        found += [("", text) for text in missing_keys(config)]
    found += override_problems(config)
    if complete and not found:  # the rules rely on the ranges
        of_the_chain = [text for rule in RULES for text in rule(config)]
        found = [("", text) for text in of_the_chain]
        found += [
            (f"overrides.{stage}", f"overrides.{stage}: {text}")
            for stage, own in overridden_stages(config)
            for rule in STAGE_RULES
            for text in rule(own)
            if text not in of_the_chain
        ]
    if len(found) == 1:
        key, text = found[0]
        raise UserError(f"{place(key)}{text}")
    if found:
        lines = [f"  {place(key) if key else ''}{text}" for key, text in found]
        raise UserError("\n".join([f"{place('')}{len(found)} problems in the configuration:", *lines]))


def missing_keys(config: Config) -> Iterator[str]:
    """One line per required key that is not set and that a stage of this chain reads."""
    for name, value in leaves(config):
        readers = READ_BY.get(name.split(".")[0], config.stages)
        if value == MISSING and not set(readers).isdisjoint(config.stages):
            yield f"{name} is required: set it in the file or on the command line ({name}=…)"


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _outside(config: Config) -> Iterator[tuple[str, Any, float]]:
    for name, value in leaves(config):
        yield from out_of_range(name, all_keys()[name].annotation, value)
