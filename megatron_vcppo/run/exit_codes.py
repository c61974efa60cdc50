"""What the exit codes of this project's processes mean; everything else is a failure."""

DONE = 0
FAILED = 1
USER_ERROR = 2
"""One line on stderr names the user's mistake: running it again would fail again."""
SAVED = 75
"""A rank that was asked to stop has saved: run the stage again (EX_TEMPFAIL of sysexits.h)."""
SIGNALLED = 128
"""Plus the number of the signal that ended the process, as shells and Slurm report it."""
