"""Who may read what is made: the umask of this project's processes, which those that they start inherit.

The mode of a run's folder keeps others out while its files are in it; a log or a checkpoint that is moved out of it has
its own mode only. So every file of a run is made with a mode that follows ``run.access``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vcppo.config.sections.run import Access

_MASKS: dict[Access, int] = {"private": 0o077, "group": 0o027}
"""as_is: the user's own, in which nobody else may write."""


def writable_by_user_only() -> None:
    """Nobody else writes what this process makes: a run's files are also code. Otherwise the user's umask holds."""
    os.umask(os.umask(0o077) | 0o022)


def follow(access: Access) -> None:
    """From now on this process makes files of one run only, for those whom ``run.access`` lets in."""
    if access in _MASKS:
        os.umask(_MASKS[access])


def umask() -> int:
    """The umask of this process, which the system tells only to whoever sets another."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def as_made_here(path: Path) -> None:
    """Give a file the mode that this process's files have: safetensors makes its own for the user alone."""
    path.chmod(0o666 & ~umask())


@contextmanager
def following(access: Access) -> Iterator[None]:
    """The same for the block, in a process that also writes elsewhere, or into other runs."""
    before = umask()
    follow(access)
    try:
        yield
    finally:
        os.umask(before)
