"""The one exception that means "the user can mend this": printed as one line, exit code 2, no traceback."""


class UserError(ValueError):
    """Something outside the code is wrong: a configuration key, a file, a checkpoint, a cluster.

    The message is one line (or a list under one line) that says what is wrong, where (file, line, key)
    and what to do. Everything else that goes wrong is a bug and keeps its traceback.
    """
