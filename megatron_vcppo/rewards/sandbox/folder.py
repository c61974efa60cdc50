"""The temporary folder that programs write to where they see the node's own file system."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from megatron_vcppo.rewards.sandbox.inside.scratch import empty

_PREFIX = "vcppo_code_"
_ENOUGH_BYTES = 256 << 20


class ScratchFolder:
    """Made private to this user, locked while it is in use; folders that killed processes have left are removed."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=_place())
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """With all in it."""
        with contextlib.suppress(OSError):  # what cannot be removed now is removed with the next one
            _remove(self.path)
        os.close(self._lock)


def _place() -> str:
    """Memory, if there is room: on a disk a program can make folders far faster than they can be removed."""
    memory = "/dev/shm"
    with contextlib.suppress(OSError):
        room = os.statvfs(memory)
        if os.access(memory, os.W_OK | os.X_OK) and room.f_bavail * room.f_frsize >= _ENOUGH_BYTES:
            return memory
    return tempfile.gettempdir()


def _remove_abandoned() -> None:
    for path in Path(_place()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner lives
                _remove(str(path))
            finally:
                os.close(descriptor)


def _remove(path: str) -> None:
    empty(path)
    os.rmdir(path)
