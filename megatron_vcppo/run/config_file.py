"""RUN/config.yaml: the resolved configuration of a run, which every process of it reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_vcppo.config import Config
from megatron_vcppo.config.keys import BEFORE
from megatron_vcppo.config.load import dump_config, load_stored_config
from megatron_vcppo.errors import UserError, storage_error
from megatron_vcppo.run import events
from megatron_vcppo.run.files import read_bytes, read_text, write_bytes, write_text
from megatron_vcppo.run.folder import RunFolder

ALWAYS_STORED = ("run", "stages", "model", "sft", "ppo", "evaluate", "cluster")
"""In every run's configuration, which holds all keys; hardly in one that a user wrote."""


def open_run(path: Path, complete: bool = True) -> tuple[RunFolder, Config]:
    """An existing run and its configuration. UserError if the folder is not a run; it names the run around it.

    complete: False for what starts no stage. Such a command also opens runs whose configuration breaks a rule of today.
    """
    run = RunFolder(path.absolute())
    if not run.config.is_file():
        above = (RunFolder(folder) for folder in run.path.parents)
        hint = next((f"; the run is {one.path}" for one in above if one.config.is_file() and one.events.is_file()), "")
        raise UserError(f"{path}: not a run folder: it has no {run.config.name}{hint}")
    config = load_stored_config(run.config, complete)
    stored = Path(config.run.dir).expanduser()
    if not (stored.exists() and stored.samefile(run.path)):
        config.run.dir = str(run.path)  # it was moved or renamed; the next start of stages stores that
    return run, config


def kept_defaults(run: RunFolder) -> dict[str, Any]:
    """What a run that exists already has for keys whose default would change it; empty for a new run."""
    if not run.config.exists():
        return {}
    try:
        stored = yaml.safe_load(read_text(run.config)) or {}
        sections = {name: dict(stored.get(name.partition(".")[0]) or {}) for name in BEFORE}
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError, ValueError):
        raise UserError(f"{run.config}: not the configuration of a run: remove it, or choose another run.dir") from None
    return {name: sections[name].get(name.partition(".")[2], before) for name, before in BEFORE.items()}


def check_run_folder_free(run: RunFolder) -> None:
    """UserError if the folder holds something that is not a run: its files may be overwritten."""
    advice = "choose another run.dir"
    try:
        names = [path.name for path in run.path.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"run.dir {run.path}: {error.strerror}") from None
    if not run.config.exists():
        if names:
            raise UserError(f"run.dir {run.path}: holds {min(names)} and is not a run folder: {advice}")
        return
    stored = yaml.safe_load(read_text(run.config))  # YAML: kept_defaults has read it
    if missing := [name for name in ALWAYS_STORED if name not in (stored or {})]:
        raise UserError(f"{run.config}: not written by a run, it has no {missing[0]}: {advice}")


@contextmanager
def config_undone(run: RunFolder) -> Iterator[None]:
    """Where the block raises, the run has the configuration again that it had before; a new run keeps the new one."""
    before = read_bytes(run.config) if run.config.exists() else None
    try:
        yield
    except BaseException:
        if before is not None and read_bytes(run.config) != before:
            write_bytes(run.config, before)
            events.append(run.path, "config_undone")
        raise


def write_config(run: RunFolder, config: Config) -> None:
    """Write the configuration; a change from before becomes an event. Only for the holder of the run's lock.

    A file with the same values is left alone. UserError if it cannot be written.
    """
    text = dump_config(config)
    try:
        run.open_to(config.run.access)
        before = read_text(run.config) if run.config.exists() else None
        if before is not None and yaml.safe_load(before) == yaml.safe_load(text):
            return
        write_text(run.config, text)
    except OSError as error:
        if found := storage_error(error, str(run.config), "run the same command again"):
            raise found from None
        raise UserError(f"run.dir {run.path}: {error.strerror}") from None
    if before is not None:
        old, new = set(before.splitlines()), set(text.splitlines())
        events.append(run.path, "config_changed", removed=sorted(old - new), added=sorted(new - old))
