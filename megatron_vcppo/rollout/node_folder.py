"""What trainer and engines of one node share when they share its GPUs: whose turn it is, and weights on their way.

In the node's memory (/dev/shm), because network file systems show changes late, and a turn that is seen late puts two
processes into one GPU's memory. The folder is private to the user. Whether a process that left something here is still
alive is told by locks on files, which the kernel drops with the process, however it ends.
"""

import fcntl
import hashlib
import os
import shutil
import stat
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Literal
from weakref import WeakSet

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import write_text

ROOT = Path("/dev/shm")
MESSAGE_BYTES_PER_WORKER = 64 << 20
"""A floor that is assumed, not measured: vLLM's queues between workers, and NCCL's buffers without peer-to-peer."""
TRAINER, USERS = "trainer", "users"
"""Locks: held by the trainer's ranks; held by everybody who uses the folder."""
Holder = Literal["trainer", "engines"]


class NodeFolder(AbstractContextManager["NodeFolder"]):
    """The folder of one node of one stage; it is there from the first user's start to the last one's ``close``."""

    def __init__(self, rendezvous: Path, node: int) -> None:
        self.weights = weights_path(rendezvous, node)
        self.path = self.weights.parent
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            found = self.path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise UserError(f"{self.path} is not a folder of this user alone: remove it")
            with suppress(FileNotFoundError):  # its last user left, and removed it, between the two lines
                self.use = self.hold(USERS)
                if (self.path / USERS).exists():
                    return

    def hold(self, name: str) -> "Hold":
        """Lock a file of the folder until the result is closed or this process ends; many may hold one."""
        return Hold(self.path / name)

    def is_held(self, name: str) -> bool:
        """Whether any living process holds it."""
        return is_held(self.path / name)

    def give_turn(self, holder: Holder) -> None:
        """Say whose turn it is on the node's GPUs."""
        write_text(self.path / "turn", holder)

    @property
    def engines_turn(self) -> bool:
        """Engines may take GPU memory: they were given the turn, or no trainer lives that could have it."""
        try:
            given = (self.path / "turn").read_text()
        except FileNotFoundError:
            return True
        return given == "engines" or not self.is_held(TRAINER)

    def starting(self) -> list[str]:
        """Engines that start now, or are being ended: they may hold GPU memory, and nobody can ask them to sleep."""
        return sorted(
            path.name.removeprefix("starting_") for path in self.path.glob("starting_*") if self.is_held(path.name)
        )

    def check_space(self, num_bytes: int) -> None:
        """Raise UserError if weights of this size do not fit next to what is there."""
        free = shutil.disk_usage(self.path).free + size_of(self.weights)
        if num_bytes > free:
            raise UserError(
                f"{ROOT}: {free / 2**30:.1f} GiB are free on {os.uname().nodename}, and the weights that pass through "
                f"it to the engines take {num_bytes / 2**30:.1f} GiB: enlarge it, or set weight_sync.transport disk"
            )

    def drop_weights(self) -> None:
        """Remove the weights."""
        shutil.rmtree(self.weights, ignore_errors=True)

    def drop_orphans(self) -> None:
        """Remove weights whose trainer was killed."""
        if self.weights.exists() and not self.is_held(TRAINER):
            self.drop_weights()

    def close(self) -> None:
        """Use the folder no more; the last user removes it."""
        self.use.close()
        if not self.is_held(USERS):
            shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.close()


def weights_path(rendezvous: Path, node: int) -> Path:
    """Where the weights for the engines of a node pass; a path on that node."""
    name = hashlib.sha256(str(rendezvous.resolve()).encode()).hexdigest()[:16]
    return ROOT / f"vcppo_{os.getuid()}_{name}_{node}" / "weights"


class Hold(AbstractContextManager["Hold"]):
    """A shared lock on a file, dropped by ``close`` or with the process; what is forked from it does not hold it."""

    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115
        fcntl.flock(self.file, fcntl.LOCK_SH)
        _holds.add(self)

    def close(self) -> None:
        """Drop it."""
        self.file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


_holds: WeakSet[Hold] = WeakSet()


def _hold_nothing() -> None:
    for hold in [*_holds]:
        hold.close()


os.register_at_fork(after_in_child=_hold_nothing)


def is_held(path: Path) -> bool:
    """Whether any process holds the file."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def remove_stale() -> None:
    """Remove what killed runs of this user left on this node; what others made under such a name stays."""
    for path in ROOT.glob(f"vcppo_{os.getuid()}_*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and not is_held(path / USERS):
                shutil.rmtree(path)


def check_message_room(num_workers: int) -> None:
    """UserError if this node's memory file system has no room for what workers of one engine, and NCCL, pass there.

    They map their buffers whole and fill them later: without room the process is killed by SIGBUS, which names no file.
    """
    needed = num_workers * MESSAGE_BYTES_PER_WORKER
    free = shutil.disk_usage(ROOT).free
    if free >= needed:
        return
    sizes = {path: num_bytes for path in ROOT.iterdir() if (num_bytes := _own_bytes(path))}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    left = f", or remove {largest} ({sizes[largest] >> 20} MiB) if its process has ended" if largest else ""
    raise UserError(
        f"{ROOT}: {free >> 20} MiB are free on {os.uname().nodename}, and {num_workers} engine workers need "
        f"{needed >> 20} MiB for messages: enlarge it{left}"
    )


def _own_bytes(path: Path) -> int:
    """Bytes of a file or folder of this user; 0 for others' and for what is gone."""
    with suppress(OSError):
        found = path.lstat()
        if found.st_uid == os.getuid():
            return size_of(path) if stat.S_ISDIR(found.st_mode) else found.st_size
    return 0


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
