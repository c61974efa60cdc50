"""Two exceptions that are no bugs (what the user can fix, printed as one line with exit code 2; a stop on request), and
what the exit codes of this project's processes mean. Every other code is a failure."""

import errno


class UserError(ValueError):
    """Something outside the code is wrong: a configuration key, a file, a checkpoint, a cluster.

    The message is one line (or a list under one line) that says what is wrong, where (file, line, key)
    and what to do. Everything else that goes wrong is a bug and keeps its traceback.
    """


_OF_THE_STORAGE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "make room, or raise the limit on the size of files",
    errno.ESTALE: "see that its file system is mounted and its server up",
    errno.EIO: "see that its disk or server works (dmesg)",
}
PASSING = (errno.ESTALE, errno.EIO)
"""May be gone when the same is tried again, which a stage does by itself."""
_OF_THE_SYSTEM = {
    errno.EROFS: "it is read-only",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EISDIR: "a file is expected there",
    errno.ENOTDIR: "a folder is expected there",
    errno.EEXIST: "something else has that name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a symbolic link that leads to itself, or that is not followed there",
    errno.ENXIO: "a file is expected there",
}


def system_error(error: OSError) -> UserError | None:
    """What the file system refuses, as the user's to fix, in one line; None for errors that are not about a file.

    For the outermost handler of a process: full disks, permissions, files where folders are expected, and the like can
    come from every read and write, so no call handles them by itself.
    """
    if found := storage_error(error, "a file", "run the same command again"):
        return found
    advice = _OF_THE_SYSTEM.get(error.errno or 0)
    if advice is None or error.filename is None:
        return None
    return UserError(f"{error.filename}: {error.strerror}: {advice}")


def storage_error(error: OSError, where: str, then: str) -> UserError | None:
    """A storage that is full or fails, in one line; None for other errors.

    where: for an error that names no file. then: what to do once the storage works.
    """
    advice = _OF_THE_STORAGE.get(error.errno or 0)
    if advice is None or (error.errno == errno.EIO and error.filename is None):  # a terminal that is gone
        return None
    return UserError(f"{error.filename or where}: {error.strerror}: {advice}, then {then}")


class Stopped(Exception):
    """All ranks agreed to stop, at a point from which a resume continues: the stage keeps what it has and leaves."""


DONE = 0
FAILED = 1
USER_ERROR = 2
"""One line on stderr names the user's mistake: running it again would fail again."""
SAVED = 75
"""A rank that was asked to stop has saved: run the stage again (EX_TEMPFAIL of sysexits.h)."""
SIGNALLED = 128
"""Plus the number of the signal that ended the process, as shells and Slurm report it."""
