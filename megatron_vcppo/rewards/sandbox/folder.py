"""The temporary folder that programs write to where they see the node's own file system."""

import contextlib
import fcntl
import os
import subprocess
import tempfile
from pathlib import Path

_PREFIX = "vcppo_code_"


class ScratchFolder:
    """Made private to this user, locked while it is in use; folders that killed processes have left are removed."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=_PREFIX)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """With all in it."""
        _remove(self.path)
        os.close(self._lock)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
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
    """rm and not shutil.rmtree: it goes to any depth."""
    subprocess.run(["rm", "-rf", "--", path], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
