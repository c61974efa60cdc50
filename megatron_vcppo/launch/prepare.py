"""From a configuration file and overrides to a run and its resolved configuration."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import dump_config, load_config
from megatron_vcppo.config.value_sources import local_overrides, profile_files
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_inputs
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder, chosen_stages


def add_chain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that starts stages."""
    parser.add_argument("config", type=Path, help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to override")
    add_stage_arguments(parser)
    add_base_argument(parser)


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """Whose finished stages to begin with."""
    parser.add_argument(
        "--base", type=Path, metavar="RUN", help="take the stages before --from from this run, which finished them"
    )


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Which part of the chain."""
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start at this stage")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--only", metavar="STAGE", help="this stage alone")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """An existing run and its configuration. UserError if the folder is not a run."""
    run = RunFolder(path.absolute())
    if not run.config.exists():
        raise UserError(f"{path}: not a run folder: it has no {run.config.name}")
    return run, load_config(run.config)


def prepare(
    config_path: Path,
    overrides: list[str],
    cluster: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[RunFolder, Config]:
    """Resolve the configuration and its run folder; writes nothing. note: see ``load_config``."""
    overrides = [*local_overrides(cluster), *overrides]
    config = load_config(config_path, overrides, profiles=profile_files(cluster), note=note)
    config.run.dir = str(Path(config.run.dir).absolute())
    return RunFolder(Path(config.run.dir)), config


def checked_stages(
    run: RunFolder, config: Config, first: str | None = None, last: str | None = None, only: str | None = None
) -> list[str]:
    """The stages that --from, --until and --only choose; UserError if one that is not done cannot start.

    Called by every command that starts stages, before it writes or copies anything.
    """
    stages = chosen_stages(list(config.stages), first, last, only)
    check_inputs(config, [stage for stage in stages if not run.marked_done(stage)])
    return stages


def print_note(text: str) -> None:
    """Where notes on a user's configuration go: standard error, so that printed YAML stays YAML."""
    print(text, file=sys.stderr)


def write_config(run: RunFolder, config: Config) -> None:
    """Write RUN/config.yaml, which every later job of the run reads; a change from before becomes an event.

    Only for the holder of the run's lock. Temporary name, fsync, rename; a file with the same values is left alone.
    """
    text = dump_config(config)
    try:
        before = run.config.read_text(encoding="utf-8") if run.config.exists() else None
        if before is not None and yaml.safe_load(before) == yaml.safe_load(text):
            return
        temporary = run.config.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, run.config)
    except OSError as error:
        raise UserError(f"run.dir {run.path}: {error.strerror}") from None
    if before is not None:
        old, new = set(before.splitlines()), set(text.splitlines())
        events.append(run.path, "config_changed", removed=sorted(old - new), added=sorted(new - old))
