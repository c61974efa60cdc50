"""Log files of roles: their last lines, and following them while they grow."""

import codecs
import sys
import threading
from pathlib import Path


def last_lines(path: Path, count: int = 12, limit_bytes: int = 16384) -> list[str]:
    """The last non-empty lines of a text file; an absent file has none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - limit_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


class Follower:
    """Copies a file, and what is appended to it, to standard output, from a thread, until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                while chunk := file.read(65536):
                    self._position += len(chunk)
                    sys.stdout.write(self._decoder.decode(chunk))
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
