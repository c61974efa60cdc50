"""The folder of an engine's unix sockets, over which its server and its workers pass pickled objects.

vLLM puts them into the temporary folder of all users, and a killed engine leaves them there. Here every start of an
engine has a folder of its own, private to the user and removed with the engine; what a killed supervisor leaves, the
user's next one on the node removes.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vcppo.rollout.node_folder import Hold, is_held

VARIABLE = "VLLM_RPC_BASE_PATH"
"""Tells an engine its folder; vLLM reads it when it makes a socket."""
IN_USE = "in_use"
"""Locked by the supervisor of the engine."""
MAX_ROOT_BYTES = 40
"""The path of a unix socket has at most 107 bytes; the names of the folder and of the socket take up to 63."""
MIN_AGE_S = 60.0
"""A younger folder may be one whose lock is still to come."""


@contextmanager
def socket_folder() -> Iterator[Path]:
    """The folder of one start of an engine, removed at the end of the block."""
    root = Path(tempfile.gettempdir())
    if len(os.fsencode(root)) > MAX_ROOT_BYTES:
        root = Path("/tmp")
    remove_stale(root)
    path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=root))
    try:
        with Hold(path / IN_USE):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove the folders of this user's supervisors that were killed."""
    for path in root.glob(f"{_prefix()}*"):
        with suppress(OSError):
            found = path.lstat()
            old = found.st_uid == os.getuid() and time.time() - found.st_mtime > MIN_AGE_S
            if old and not is_held(path / IN_USE):
                shutil.rmtree(path)


def _prefix() -> str:
    return f"vcppo-{os.getuid()}-"
