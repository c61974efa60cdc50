"""What a run can do without: checkpoints that nothing will load, rollouts of a chain that is done."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import remove
from megatron_vcppo.run.folder import RunFolder, StageFolder, iteration_name
from megatron_vcppo.run.manifest import MANIFEST_NAME
from megatron_vcppo.run.usage import size_bytes

_CHECKPOINT = re.compile(r"\.?iter_\d{7,18}(\.\w+)?$")
"""A checkpoint, or what a kill left of one that was being written or replaced."""


@dataclass(frozen=True)
class Removable:
    """One file or folder. Example: ``Removable(RUN/ppo/checkpoints/iter_0000020, "old checkpoint", 5_000_000)``."""

    path: Path
    what: str
    num_bytes: int


def removable(run: RunFolder, stages: Sequence[str], exported: str = "last") -> list[Removable]:
    """What can go without changing what a resume, a later stage or an export finds, by stage.

    Of a stage that is done its last checkpoint stays, of another one the newest complete checkpoint. Rollouts go only
    when every stage of the chain is done. Nothing is found through symbolic links, which may lead to another run, nor
    what is not named as a checkpoint is. UserError if a manifest is damaged.

    stages: the chain. exported: export.checkpoint; one that it names by its iteration stays.
    """
    finished = all(run.stage(stage).is_done(checksums=False) for stage in stages)
    found = []
    for stage in stages:
        folder = run.stage(stage)
        found += [Removable(path, "old checkpoint", size_bytes(path)) for path in _old_checkpoints(folder, exported)]
        if finished and folder.rollouts.is_dir() and not _linked(folder, folder.rollouts):
            found.append(Removable(folder.rollouts, "rollouts", size_bytes(folder.rollouts)))
    return found


def _old_checkpoints(folder: StageFolder, exported: str) -> Iterator[Path]:
    if folder.marked_done():
        kept = folder.manifest_checkpoint()
    else:
        newest = folder.checkpoint_iteration()
        kept = None if newest is None else folder.checkpoint(newest)
    if kept is None or _linked(folder, folder.checkpoints):
        return
    number = exported.removeprefix("iter_")
    names = {kept.name, iteration_name(int(number)) if number.isdecimal() else ""}
    for path in sorted(folder.checkpoints.glob("*")):
        is_own = _CHECKPOINT.match(path.name) and path.is_dir() and not path.is_symlink()
        if is_own and path.name not in names:
            yield path


def _linked(folder: StageFolder, path: Path) -> bool:
    return folder.path.is_symlink() or path.is_symlink()


def clean(found: Sequence[Removable]) -> None:
    """Remove it. A checkpoint loses its manifest first: what a kill leaves of it counts as incomplete."""
    for item in found:
        remove(item.path / MANIFEST_NAME)
        remove(item.path)
        if item.path.exists():
            raise UserError(f"{item.path}: could not be removed: check its permissions")
