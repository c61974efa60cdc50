"""Problems by name instead of a file with the project's keys: ``NAME:REST?option=value&option=value``."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_vcppo.data.benchmarks import BENCHMARKS, OPTIONS
from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks import reasoning_gym

NAMES = (reasoning_gym.TASK, *BENCHMARKS)


@dataclass(frozen=True)
class NamedSource:
    """Example: ``reasoning_gym:gsm_symbolic?size=1000&seed=1`` has the rest gsm_symbolic and the options size, seed."""

    name: str
    rest: str
    """A data set of reasoning-gym; for a benchmark, where its rows are: a source of ``read_samples``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values as YAML reads them."""

    @property
    def file(self) -> str | None:
        """Where a benchmark's rows are; None for problems that are made."""
        return self.rest if self.name in BENCHMARKS else None


def named_source(source: str) -> NamedSource | None:
    """A source by its name; None if it is a file, a folder or a data set. Raises UserError for a malformed option."""
    name, colon, rest = source.partition(":")
    if name not in NAMES or not colon:
        return None
    rest, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        key, equals, value = part.partition("=")
        if not key or not equals or key in options:
            raise UserError(f"{source}: {part!r} must be option=value, each option once")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{source}: {value!r} of option {key} is not YAML") from None
    known = OPTIONS.get(name, set())
    if name in BENCHMARKS and (unknown := options.keys() - known):
        has = f"has the options {', '.join(sorted(known))}" if known else "has no options"
        raise UserError(f"{source}: {name} {has}, not {', '.join(sorted(unknown))}")
    return NamedSource(name, rest, options)


def check_named(source: NamedSource, held_out: bool) -> None:
    """UserError for what can be seen before anything is read. held_out: whether the problems are for evaluation."""
    if source.name in BENCHMARKS:
        return
    reasoning_gym.check_source(source.rest, source.options)
    is_test = source.options.get("split") == "test"
    if is_test and not held_out:
        raise UserError(f"reasoning_gym:{source.rest}: split=test is held out: use it in prompts.test only")
    if held_out and not is_test:
        raise UserError(f"reasoning_gym:{source.rest}: held-out problems need split=test")


def made_rows(source: NamedSource) -> Iterator[dict[str, str]] | None:
    """Problems that are made, not read, with the keys prompt, answer and task; None for a benchmark.

    Raises UserError, with the first row, if they cannot be made.
    """
    return None if source.name in BENCHMARKS else reasoning_gym.rows(source.rest, source.options)


def benchmark_row(source: NamedSource, row: Any) -> dict[str, str] | None:
    """A row of a benchmark's file with the keys prompt, answer and task; None if the options leave it out.

    Raises ValueError if it is malformed or cannot be judged.
    """
    try:
        return BENCHMARKS[source.name](row, source.options)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a row of {source.name} ({type(error).__name__}: {error})") from None
