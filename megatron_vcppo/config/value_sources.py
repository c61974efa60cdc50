"""Where configuration values come from: YAML files with their includes, and key=value on the command line."""

import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
"""The shipped files; includes are looked up next to the including file first, then here."""
INCLUDES = "defaults"
_HUGE_NUMBER = re.compile(r"\b(0[xb])?[0-9a-f_:]{3500}", re.IGNORECASE)
"""Python refuses to write or read numbers of more than 4,300 digits."""


@dataclass(frozen=True)
class Source:
    """Values from one file or from the command line, with the line of each."""

    name: str
    values: DictConfig
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each dotted key, counted from 1."""

    def where(self, key: str) -> str:
        """``file:line`` of a key, or of the innermost section around it that has one."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.name}:{self.lines[key]}" if key else self.name


def file_sources(path: Path, including: tuple[Path, ...] = ()) -> list[Source]:
    """A YAML file after everything it includes, in merge order.

    A file includes others by a list ``defaults: [models/tiny, …]``; later ones override earlier ones, and the file
    itself overrides them all. Raises UserError for files that are missing, unreadable, not YAML, or include themselves.
    """
    resolved = path.resolve()
    if resolved in including:
        cycle = " → ".join(str(file.name) for file in (*including[including.index(resolved) :], resolved))
        raise UserError(f"{path}: includes itself: {cycle}")
    source = _read(path)
    includes = typing.cast(dict[str, Any], OmegaConf.to_container(source.values)).get(INCLUDES, [])
    source.values.pop(INCLUDES, None)
    if not isinstance(includes, list) or not all(isinstance(include, str) for include in includes):
        raise UserError(f"{source.where(INCLUDES)}: {INCLUDES} must be a list of files such as [models/tiny]")
    sources: list[Source] = []
    for include in includes:
        included = _find_include(include, path, source.where(INCLUDES))
        sources += file_sources(included, (*including, resolved))
    return [*sources, source]


def profile_files(cluster: str | None) -> list[Path]:
    """The file of --cluster NAME: configs/cluster/NAME.yaml, or a path. UserError lists the available profiles."""
    if cluster is None or cluster == LOCAL:
        return []
    path = Path(cluster) if cluster.endswith((".yaml", ".yml")) else CONFIGS / "cluster" / f"{cluster}.yaml"
    if not path.is_file():
        known = ", ".join([LOCAL, *sorted(file.stem for file in (CONFIGS / "cluster").glob("*.yaml"))])
        raise UserError(f"--cluster {cluster}: no such profile; available: {known}, or a YAML file")
    return [path]


def local_overrides(cluster: str | None) -> list[str]:
    """The overrides of --cluster NAME: none except for local, which has no profile file."""
    return [f"cluster.name={LOCAL}"] if cluster == LOCAL else []


def path_override(key: str, path: Path) -> str:
    """``key=path`` as one argument, whose path YAML takes as it is."""
    return f"{key}={json.dumps(str(path), ensure_ascii=False)}"


def command_line_source(overrides: Sequence[str]) -> Source:
    """``key=value`` arguments; later ones override earlier ones. Raises UserError for what does not parse."""
    parts = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.\[\]-]*", key):
            raise UserError(f"override {override!r}: expected key=value, such as sft.steps=100")
        try:
            parts.append(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise UserError(f"override {override!r}: {str(error).splitlines()[0]}") from None
        except RecursionError:
            raise UserError(f"override {override[:60]!r}…: nested too deeply") from None
    return Source("command line", typing.cast(DictConfig, OmegaConf.merge(OmegaConf.create(), *parts)))


def _read(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"configuration {path}: {reason}") from None
    if huge := _HUGE_NUMBER.search(text):
        raise UserError(f"{path}:{text.count(chr(10), 0, huge.start()) + 1}: a number of more than 3,500 digits")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None and not isinstance(tree, yaml.MappingNode):
            raise UserError(f"{path}:{tree.start_mark.line + 1}: expected keys and values at the top level")
        values = OmegaConf.create(text) if tree is not None else OmegaConf.create()
        lines = dict(_lines(tree, "")) if tree is not None else {}
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except (ValueError, LookupError) as error:  # of !!int x, of !!bool maybe
        raise UserError(f"{path}: not valid YAML: a value that cannot be read: {error}") from None
    assert isinstance(values, DictConfig)
    return Source(str(path), values, lines)


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.")


def _find_include(include: str, includer: Path, where: str) -> Path:
    name = include if include.endswith((".yaml", ".yml")) else f"{include}.yaml"
    folders = [includer.parent, CONFIGS]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{where}: included file {name} not found in {folders[0]} or {folders[1]}")
