"""Messages between the scorer and its workers: JSON behind a length, over a socket, each within a deadline.

Nothing that comes from a worker is trusted: it runs verifiers, which read what a model wrote.
"""

import json
import socket
import struct
import time
from typing import Any

MAX_BYTES = 64 << 20


class BrokenMessage(Exception):
    """What came is no message."""


def send(connection: socket.socket, message: Any, timeout_s: float | None = None) -> None:
    """timeout_s: None waits as long as it takes. Raises TimeoutError, OSError."""
    connection.settimeout(timeout_s)
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("!I", len(data)) + data)


def receive(connection: socket.socket, timeout_s: float | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """The next message, the whole of it within the time. Raises TimeoutError, EOFError, OSError, BrokenMessage."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    (length,) = struct.unpack("!I", _read(connection, 4, deadline))
    if length > max_bytes:
        raise BrokenMessage(f"a message of {length} bytes; the most is {max_bytes}")
    try:
        return json.loads(_read(connection, length, deadline))
    except (ValueError, RecursionError) as error:
        raise BrokenMessage(f"no JSON: {type(error).__name__}") from None


def _read(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            connection.settimeout(remaining)
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
