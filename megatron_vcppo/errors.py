"""Two exceptions that are no bugs (what the user can fix, printed as one line with exit code 2; a stop on request), and
what the exit codes of this project's processes mean. Every other code is a failure."""


class UserError(ValueError):
    """Something outside the code is wrong: a configuration key, a file, a checkpoint, a cluster.

    The message is one line (or a list under one line) that says what is wrong, where (file, line, key)
    and what to do. Everything else that goes wrong is a bug and keeps its traceback.
    """


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
