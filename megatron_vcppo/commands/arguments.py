"""Arguments that several commands have, and what they name: a run, its configuration, a part of the chain."""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.rules.nodes import run_path_problems
from megatron_vcppo.config.value_sources import local_overrides, profile_files
from megatron_vcppo.data.template_check import check_chat_template
from megatron_vcppo.data.vocabulary import check_vocabulary
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_inputs
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import check_run_folder_free, kept_defaults
from megatron_vcppo.run.folder import RunFolder


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


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def natural(text: str) -> int:
    """The type of an argument that may be 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")


def prepare(
    config_path: Path,
    overrides: list[str],
    cluster: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[RunFolder, Config]:
    """Resolve the configuration and its run folder; writes nothing. note: see ``load_config``."""
    overrides = [*local_overrides(cluster), *overrides]
    profiles = profile_files(cluster)
    config = load_config(config_path, overrides, profiles=profiles, note=note)
    if defaults := kept_defaults(RunFolder.of(config)):
        config = load_config(config_path, overrides, profiles=profiles, defaults=defaults)
    config.run.dir = str(RunFolder.of(config).path.absolute())
    return RunFolder.of(config), config


def checked_stages(
    run: RunFolder, config: Config, first: str | None = None, last: str | None = None, only: str | None = None
) -> list[str]:
    """The stages that --from, --until and --only choose; UserError if one that is not done cannot start.

    Called by every command that starts stages, before it writes or copies anything.
    """
    stages = chosen_stages(list(config.stages), first, last, only)
    for problem in run_path_problems(str(run.path.absolute()), config.cluster.name):
        raise UserError(problem)
    check_run_folder_free(run)
    check_inputs(config, [stage for stage in stages if not run.stage(stage).marked_done()])
    check_chat_template(Path(config.model.hf))
    if note := check_vocabulary(Path(config.model.hf)):
        print_note(f"note: {note}")
    return stages


def check_not_queued(run: RunFolder) -> None:
    """UserError if Slurm has jobs of this run, which read its configuration; for commands that start stages here."""
    if any(event["event"] == "submitted" for event in events.read(run.path)) and shutil.which("squeue"):
        from megatron_vcppo.slurm.submission import check_not_active

        check_not_active(run)


def print_note(text: str) -> None:
    """Where notes on a user's configuration go: standard error, so that printed YAML stays YAML."""
    print(text, file=sys.stderr)


def chosen_stages(stages: list[str], first: str | None, last: str | None, only: str | None) -> list[str]:
    """The part of the chain that --from, --until and --only name. UserError for a name that is not in the chain."""
    for name in (first, last, only):
        if name is not None and name not in stages:
            raise UserError(f"stage {name!r} is not in this configuration's stages: {', '.join(stages)}")
    if only is not None and (first is not None or last is not None):
        raise UserError("--only names one stage: leave out --from and --until")
    if only is not None:
        return [only]
    start = stages.index(first) if first else 0
    end = stages.index(last) + 1 if last else len(stages)
    if start >= end:
        raise UserError(f"--from {first} comes after --until {last} in stages: {', '.join(stages)}")
    return stages[start:end]
