"""Two exceptions that are no bugs: what the user can fix, printed as one line with exit code 2; a stop on request."""


class UserError(ValueError):
    """Something outside the code is wrong: a configuration key, a file, a checkpoint, a cluster.

    The message is one line (or a list under one line) that says what is wrong, where (file, line, key)
    and what to do. Everything else that goes wrong is a bug and keeps its traceback.
    """


class Stopped(Exception):
    """All ranks agreed to stop, at a point from which a resume continues: the stage keeps what it has and leaves."""
