"""Defaults ← YAML files ← command line, into one checked Config; and back to YAML."""

import copy
import functools
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vcppo.config.checks import check_config
from megatron_vcppo.config.keys import all_keys, all_sections, nearest_key
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.value_sources import Source, command_line_source, file_sources
from megatron_vcppo.errors import UserError

T = TypeVar("T")

REMOVED: dict[str, tuple[Any, str]] = {
    "rollout.interface": ("lo", "engines use cluster.network_interface, as everything else does; remove this line"),
}
"""Keys of earlier versions → their default, which resolved configurations of old runs hold and is passed over, and what
to do about another value."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), complete: bool = True, profiles: Sequence[str | Path] = ()
) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file; the files it includes are merged before it.
        overrides: ``key=value`` arguments, the last word.
        complete: the configuration is for a run: every key that its stages require is set. False takes a part, such
            as a model's file.
        profiles: further YAML files, merged after the first, such as a cluster's.

    Raises UserError naming file, line and key: unknown key (with the nearest known one), wrong type or word, missing
    file or key, values that do not fit each other.
    """
    merged = copy.deepcopy(_defaults())
    files = [source for file in (path, *profiles) for source in file_sources(Path(file))]
    for source in [*files, command_line_source(overrides)]:
        _override(merged, source)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {_first_line(error)}") from None
    config = _build(Config, typing.cast(dict[str, Any], values))
    try:
        check_config(config, complete)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives an equal Config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over every resolved value: two equal configurations have one hash, on any machine."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


@functools.cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(Config)


def _override(config: DictConfig, source: Source) -> None:
    """Put the values of ``source`` into ``config``, key by key, so that an error knows its key."""
    values = OmegaConf.to_container(source.values, resolve=False)
    for name, value in _checked_leaves(typing.cast(dict[str, Any], values), "", source):
        try:
            OmegaConf.update(config, name, value)
        except OmegaConfBaseException:
            key = all_keys()[name]
            raise UserError(f"{source.where(name)}: {name} must be {key.type_text}, got {value!r}") from None


def _checked_leaves(values: Mapping[Any, Any], prefix: str, source: Source) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf. UserError for names that the schema does not have."""
    for part, value in values.items():
        name = f"{prefix}{part}"
        if name in all_sections():
            if not isinstance(value, Mapping):
                raise UserError(f"{source.where(name)}: {name} is a section with keys of its own, got {value!r}")
            yield from _checked_leaves(value, f"{name}.", source)
        elif name in REMOVED:
            default, hint = REMOVED[name]
            if value != default:
                raise UserError(f"{source.where(name)}: {name} is no longer a key: {hint}")
        elif name in all_keys():
            yield name, _as_word(value, all_keys()[name].choices)
        else:
            near = nearest_key(name)
            hint = f"; did you mean {near}?" if near else f"; known at the top: {', '.join(_top_level())}"
            raise UserError(f"{source.where(name)}: unknown key {name}{hint}")


def _as_word(value: Any, choices: tuple[str, ...]) -> Any:
    """YAML reads a bare off as false; where a word is expected, the word is meant."""
    if isinstance(value, bool):
        words = ("on", "yes", "true") if value else ("off", "no", "false")
        return next((word for word in words if word in choices), value)
    return value


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from nested dictionaries; missing values stay "???" for ``check_config`` to name."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _build(hints[name], v) if is_dataclass(hints[name]) else v for name, v in values.items()})


def _top_level() -> list[str]:
    return [name for name in (*all_sections(), *all_keys()) if "." not in name]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
