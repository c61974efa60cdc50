"""What a process tells its user: one place, one format, ``HH:MM:SS ROLE RANK: TEXT``.

A process that belongs to a run calls ``configure`` once, first of all: a trainer rank as ("trainer", its rank), a
rollout node as ("rollout", its index), a job that starts and watches them as ("controller"). From then on

- ``say(text)`` prints what a user must see: a result, ``note: …``, ``warning: …``. The caller decides which rank says
  it. A table begins on a new line: ``say(f"results:\n{table}")``;
- ``logging.getLogger(__name__)`` of a module is for what only someone who reads that rank's log looks for. Its records
  appear in the same format, from INFO of this package and from WARNING of libraries on.

Both go to standard output, which is the log file of the role; that of rank 0 is shown on the terminal, too. Before
``configure``, in tests and in ``vcppo`` commands that start nothing, ``say`` prints the text alone.

The log files of roles are read and followed here, too.
"""

import codecs
import logging
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vcppo.run.files import open_file

_MAY_BE_HIDDEN = re.compile(r"[^\t\n\x20-\x7e]")
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, marks that are not seen, halves of pairs, and ends of lines."""
_JOINERS = "\u200c\u200d"
"""Of Persian and Indic words, and of emoji."""
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


@contextmanager
def speaking_as(role: str) -> Iterator[None]:
    """A part of a process's life in which it has a role, such as a command that runs a chain."""
    global _speaker
    before = _speaker
    configure(role)
    try:
        yield
    finally:
        _speaker = before


def say(text: str) -> None:
    """Print a line that a user must see, such as ``say(f"warning: step {step}: …")``; more lines may follow in it.

    What a model wrote may be in it: control characters are shown escaped.
    """
    print(line(printable(text)), flush=True)


def printable(text: str) -> str:
    r"""The text with all that is not seen, but line breaks, tabs and joiners, written out: ESC as ``\x1b``.

    For everything that a model or a file from elsewhere wrote, wherever it is shown: a terminal would obey it (clear
    the screen, change the title, answer into the shell), and marks of text direction show a text as another one.
    """
    return _MAY_BE_HIDDEN.sub(lambda found: _shown(found[0]), text)


def _shown(character: str) -> str:
    is_hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
    return ascii(character)[1:-1] if is_hidden else character


def line(text: str) -> str:
    """The text as ``say`` prints it."""
    return f"{time.strftime('%H:%M:%S')} {_speaker}: {text}" if _speaker else text


class _Say(logging.Handler):
    """Records in the format of ``say``; the level is named from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(level + self.format(record))


def last_lines(path: Path, count: int = 12, limit_bytes: int = 16384) -> list[str]:
    """The last non-empty lines of a text file; an absent file has none."""
    try:
        with open_file(path) as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - limit_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


class Follower:
    """Copies a file, and what is appended to it, to standard output, from a thread, until ``close``.

    OSError for a pipe or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._closed = threading.Event()
        with suppress(FileNotFoundError):  # it may come; a pipe would be waited for
            open_file(path).close()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        try:
            with open_file(self.path) as file:
                file.seek(self._position)
                while chunk := file.read(65536):
                    self._position += len(chunk)
                    sys.stdout.write(printable(self._decoder.decode(chunk).replace("\r\n", "\n").replace("\r", "\n")))
        except FileNotFoundError:
            return
        sys.stdout.flush()

    def _follow(self) -> None:
        while not self._closed.wait(0.2):
            self._copy()

    def close(self) -> None:
        """Copy what is left and end the thread."""
        self._closed.set()
        self._thread.join(5)
        self._copy()
