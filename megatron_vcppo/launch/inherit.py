"""A run that begins with the finished stages of another one: one SFT model and one critic, many PPO arms."""

import os
import shutil
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.files import replacing
from megatron_vcppo.run.folder import RunFolder

LINKED_BYTES = 1 << 16
"""Larger files are hard-linked where the file system can: checkpoints and rollouts, which are never written again."""
NOT_TAKEN = shutil.ignore_patterns("rendezvous", "logs", "wandb*")


def take_stages(run: RunFolder, config: Config, base: Path, first: str | None) -> None:
    """Put the stages of the chain before ``first`` into ``run``, as ``base`` finished them; those there are kept.

    UserError if there is nothing to take, if a stage is not done in ``base`` or was begun in ``run``, or if ``base``
    trains another model.
    """
    before = list(config.stages[: config.stages.index(first)]) if first in config.stages else []
    if not before:
        raise UserError(f"--base {base} takes the stages before --from STAGE: name one of {', '.join(config.stages)}")
    source, theirs = open_run(base)
    if Path(theirs.model.hf).resolve() != Path(config.model.hf).resolve():
        raise UserError(f"--base {base}: its model.hf is {theirs.model.hf}, here it is {config.model.hf}")
    for stage in before:
        if run.stage(stage).is_done(checksums=False):
            continue
        if not source.stage(stage).is_done():
            raise UserError(f"--base {base}: stage {stage} is not done there")
        if run.stage(stage).path.exists():
            raise UserError(f"{run.stage(stage).path}: was begun here; remove it, or run without --base")
        with replacing(run.stage(stage).path) as copy:
            shutil.copytree(source.stage(stage).path, copy, ignore=NOT_TAKEN, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    if os.path.getsize(source) >= LINKED_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, target)
