"""Defaults ← YAML files ← command line, into one checked Config; and back to YAML."""

import copy
import functools
import hashlib
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vcppo.config.keys import BEFORE, REMOVED, RENAMED, all_keys, all_sections, nearest_key
from megatron_vcppo.config.rules.notes import notes
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.config.value_sources import Source, command_line_source, file_sources
from megatron_vcppo.errors import UserError

T = TypeVar("T")


def _no_environment(*_: str) -> str:
    raise ValueError("a run's configuration is stored, and may hold no values of the environment: write the value")


OmegaConf.register_resolver("oc.env", _no_environment, replace=True)


@dataclass(frozen=True)
class Given:
    """A value of a source."""

    name: str
    """Dotted key as it is called now."""
    written: str
    """Dotted key as it is in the source: an old name, or the same."""
    value: Any


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    complete: bool = True,
    profiles: Sequence[str | Path] = (),
    note: Callable[[str], None] = lambda text: None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file; the files it includes are merged before it.
        overrides: ``key=value`` arguments, which override all files.
        complete: the configuration is for a run: every key that its stages require must be set. False accepts a part,
            such as a model's file, and checks only its ranges.
        profiles: more YAML files, merged after the first, such as a cluster's.
        note: called with one line per key that has an old name, and per value that cannot do what it is for.
        defaults: by dotted key, in place of the key's default.

    Raises UserError naming file, line and key: unknown key (with the nearest known one), wrong type or word, value out
    of range, missing file or key, values that do not fit each other.
    """
    merged = copy.deepcopy(_defaults())
    for name, value in defaults.items():
        OmegaConf.update(merged, name, value)
    places: dict[str, str] = {}
    files = [source for file in (path, *profiles) for source in file_sources(Path(file))]
    for source in [*files, command_line_source(overrides)]:
        places |= _override(merged, source, note)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {_first_line(error)}") from None
    config = _build(Config, typing.cast(dict[str, Any], values))
    check_config(config, complete, lambda key: f"{_place(places, key) or path}: ")
    for text in notes(config) if complete else ():
        note(f"note: {text}")
    return config


def load_stored_config(path: Path, complete: bool = True) -> Config:
    """A run's config.yaml; what it lacks is as it was when the run was made. complete, errors: see ``load_config``."""
    return load_config(path, complete=complete, defaults=BEFORE)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives an equal Config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over every resolved value: two equal configurations have one hash, on any machine."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


@functools.cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(Config)


def _override(config: DictConfig, source: Source, note: Callable[[str], None]) -> dict[str, str]:
    """Put the values of ``source`` into ``config``, key by key, so that an error knows its key; returns their places.

    The places are ``file:line`` by dotted key, including the keys of dictionaries.
    """
    values = typing.cast(dict[str, Any], OmegaConf.to_container(source.values, resolve=False))
    written: dict[str, str] = {}
    places: dict[str, str] = {}
    for given in _givens(values, "", source):
        name, place = given.name, source.where(given.written)
        if name in written:
            old = given.written if given.written != name else written[name]
            raise UserError(f"{source.where(old)}: {old} is the old name of {name}, which is also set: remove one")
        written[name] = given.written
        if given.written != name:
            note(f"note: {place}: {given.written} is now called {name}")
        try:
            OmegaConf.update(config, name, given.value)
        except OmegaConfBaseException:
            raise UserError(f"{place}: {name} must be {all_keys()[name].type_text}, got {given.value!r}") from None
        places[name] = place
        if isinstance(given.value, Mapping):
            places |= {f"{name}.{key}": source.where(f"{given.written}.{key}") for key in _names(given.value)}
    return places


def _names(values: Mapping[Any, Any]) -> Iterator[str]:
    """Dotted names of everything in nested dictionaries."""
    for key, value in values.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _names(value))


def _place(places: Mapping[str, str], key: str) -> str | None:
    """Where a key is set, or the item of a list (``key[0]``) or dictionary (``key.item``)."""
    key = key.partition("[")[0]
    return places.get(key) or places.get(key.rpartition(".")[0])


def _givens(values: Mapping[Any, Any], prefix: str, source: Source) -> Iterator[Given]:
    """Every leaf, under its present name. UserError for names that the schema does not have."""
    for part, value in values.items():
        written = f"{prefix}{part}"
        name = RENAMED.get(written, written)
        if name in all_sections():
            if not isinstance(value, Mapping):
                raise UserError(f"{source.where(written)}: {name} is a section with keys, got {value!r}")
            yield from _givens(value, f"{name}.", source)
        elif name in REMOVED:
            ignored, advice = REMOVED[name]
            if value not in ignored:
                raise UserError(f"{source.where(name)}: {name} is no longer a key: {advice}")
        elif name in all_keys():
            yield Given(name, written, _with_new_names(_as_word(value, all_keys()[name].choices)))
        else:
            near = nearest_key(name)
            hint = f"; did you mean {near}?" if near else f"; top-level keys are {', '.join(_top_level())}"
            raise UserError(f"{source.where(name)}: unknown key {name}{hint}")


def _with_new_names(value: Any) -> Any:
    """Interpolations such as ``${ppo.skip_limit}`` follow a renamed key."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([\w.]+)\}", lambda found: f"${{{RENAMED.get(found[1], found[1])}}}", value)


def _as_word(value: Any, choices: tuple[str, ...]) -> Any:
    """YAML reads an unquoted off as false; where a word is expected, take the word."""
    if isinstance(value, bool):
        words = ("on", "yes", "true") if value else ("off", "no", "false")
        return next((word for word in words if word in choices), value)
    return value


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from nested dictionaries; missing values stay "???", which ``check_config`` reports."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _build(hints[name], v) if is_dataclass(hints[name]) else v for name, v in values.items()})


def _top_level() -> list[str]:
    return [name for name in (*all_sections(), *all_keys()) if "." not in name]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
