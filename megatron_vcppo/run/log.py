"""What a process tells its user: one place, one format, ``HH:MM:SS ROLE RANK: TEXT``.

A process that belongs to a run calls ``configure`` once, first of all: a trainer rank as ("trainer", its rank), a
rollout node as ("rollout", its index), what starts and watches them as ("controller"). From then on

- ``say(text)`` prints what a user must see: a result, ``note: …``, ``warning: …``. The caller decides which rank says
  it. A table begins on a line of its own: ``say(f"results:\n{table}")``;
- ``logging.getLogger(__name__)`` of a module is for what only someone who reads that rank's log looks for. Its records
  appear in the same format, from INFO of this package and from WARNING of libraries on.

Both go to standard output, which is the log file of the role; that of rank 0 is shown on the terminal, too. Before
``configure``, in tests and in ``vcppo`` commands that start nothing, ``say`` prints the text alone.
"""

import logging
import time

_speaker = ""
"""Role and rank of this process."""


def configure(role: str, rank: int | None = None) -> None:
    """Name this process in every line that it writes, and show the records of Python's logging."""
    global _speaker
    _speaker = role if rank is None else f"{role} {rank}"
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logging.getLogger("megatron_vcppo").setLevel(logging.INFO)
    if not any(isinstance(handler, _Say) for handler in root.handlers):
        root.addHandler(_Say())


def say(text: str) -> None:
    """Print a line that a user must see, such as ``say(f"warning: step {step}: …")``; more lines may follow in it."""
    print(line(text), flush=True)


def line(text: str) -> str:
    """The text as ``say`` prints it."""
    return f"{time.strftime('%H:%M:%S')} {_speaker}: {text}" if _speaker else text


class _Say(logging.Handler):
    """Records in the format of ``say``; the level is named from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(level + self.format(record))
