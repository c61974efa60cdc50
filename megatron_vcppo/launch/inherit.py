"""A run that begins with the finished stages of another one: one SFT model and one critic, many PPO arms."""

import json
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.files import replacing
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.manifest import check_links

FORMAT = ("template", "system", "apply_chat_template", "chat_template_kwargs")
"""Keys of ``prompts`` that say how the model reads a prompt."""
LINKED_BYTES = 1 << 16
"""Larger files are hard-linked where the file system can: checkpoints and rollouts, which are never written again."""
NOT_TAKEN = ("rendezvous", "logs", "kept", "wandb*")


def stages_to_take(run: RunFolder, config: Config, base: Path | None, first: str | None) -> list[Path]:
    """Folders in ``base`` of the stages before ``first`` that ``run`` is to take from it; none without a base.

    Those that ``run`` has done are kept. UserError if ``first`` leaves nothing to take, if a stage is not done in
    ``base`` or was started in ``run``, or if ``base`` trains another model; one that was moved is believed.
    """
    if base is None:
        return []
    before = list(config.stages[: config.stages.index(first)]) if first in config.stages else []
    if not before:
        raise UserError(f"--base {base} takes the stages before --from STAGE: name one of {', '.join(config.stages)}")
    source, theirs = open_run(base)
    if Path(theirs.model.hf).resolve() != Path(config.model.hf).resolve():
        models = f"--base {base}: its model.hf is {theirs.model.hf}, here it is {config.model.hf}"
        if Path(theirs.model.hf).exists():
            raise UserError(models)
        say(f"note: {models}; the first is gone, so whether they are the same was not checked")
    missing = [stage for stage in before if not run.stage(stage).is_done(checksums=False)]
    for stage in missing:
        if not source.stage(stage).is_done():
            raise UserError(f"--base {base}: stage {stage} is not done there")
        check_links(source.stage(stage).path, NOT_TAKEN)  # a copy would hold what they lead to
        if run.stage(stage).path.exists():
            raise UserError(f"{run.stage(stage).path}: was started here; remove it, or run without --base")
    if missing and (differ := [key for key in FORMAT if getattr(theirs.prompts, key) != getattr(config.prompts, key)]):
        values = ", ".join(f"prompts.{key}={json.dumps(getattr(theirs.prompts, key))}" for key in differ)
        say(f"note: --base {base} formatted prompts otherwise; for the prompts that its models know: {values}")
    return [source.stage(stage).path for stage in missing]


def take_stages(run: RunFolder, folders: Sequence[Path]) -> None:
    """Put finished stages of another run into ``run``: large files as hard links, where possible.

    Only for the holder of the run's lock. UserError if a stage was started in ``run`` meanwhile.
    """
    for folder in folders:
        if run.stage(folder.name).path.exists():
            raise UserError(f"{run.stage(folder.name).path}: was started here; remove it, or run without --base")
        with replacing(run.stage(folder.name).path) as copy:
            ignore = shutil.ignore_patterns(*NOT_TAKEN)
            shutil.copytree(folder, copy, symlinks=True, ignore=ignore, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    if not stat.S_ISREG(os.lstat(source).st_mode):
        raise UserError(f"{source}: neither a file nor a folder; remove it, or run without --base")
    if os.path.getsize(source) >= LINKED_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, target)
