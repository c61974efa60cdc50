"""Two processes that call each other: the tests in one, the program in the other, plain data between them.

Frames on the socket are a length (4 bytes) and JSON. ``{"op": "call", "on": 3, "args": […]}`` asks, ``{"value": …}`` or
``{"error": [names of the exception's class and its bases, text]}`` answers; while one side waits for an answer it
serves what the other asks, so that a test can pass a function to the program.
"""

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

from megatron_vcppo.rewards.sandbox.inside import plain

_MAX_FRAME = 16 << 20


class Gone(BaseException):
    """The other side has ended. No ordinary exception: no ``except Exception`` of a test may pass over it."""


class Peer:
    """One end. ``operations`` is all that the other side may ask of this one."""

    def __init__(
        self,
        connection: socket.socket,
        operations: dict[str, Callable[..., Any]],
        refer: Callable[["Peer", Any], dict[str, Any]],
        resolve: Callable[["Peer", str, Any], Any],
        remote_error: Callable[[list[str], str], BaseException],
    ) -> None:
        self._connection = connection
        self._operations = operations
        self._refer, self._resolve, self._remote_error = refer, resolve, remote_error
        self._objects: list[Any] = []

    def keep(self, value: Any) -> int:
        """A number by which the other side may name this object."""
        self._objects.append(value)
        return len(self._objects) - 1

    def kept(self, number: Any) -> Any:
        """The object of that number. Raises ValueError."""
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self._objects):
            raise ValueError("no such object")
        return self._objects[number]

    def encode(self, value: Any) -> Any:
        """Plain data, or a reference."""
        return plain.encode(value, lambda other: self._refer(self, other))

    def decode(self, data: Any) -> Any:
        """The value; raises ValueError."""
        return plain.decode(data, lambda kind, content: self._resolve(self, kind, content), arrays=True)

    def ask(self, op: str, **arguments: Any) -> Any:
        """The reply of the other side, still encoded. Raises what the other side raised, or Gone."""
        self._send({"op": op, **arguments})
        while True:
            message = self._receive()
            if "op" in message:
                self._answer(message)
            elif "error" in message:
                names, text = message["error"]
                raise self._remote_error([str(name) for name in names], str(text))
            else:
                return message["value"]

    def serve(self) -> None:
        """Answer until the other side has ended."""
        try:
            while True:
                self._answer(self._receive())
        except Gone:
            return

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            operation = self._operations[message.pop("op")]
            reply = {"value": operation(self, **message)}
        except Gone:
            raise
        except BaseException as error:  # SystemExit too: what a call raises is its result
            names = [kind.__name__ for kind in type(error).__mro__]
            try:
                text = str(error)
            except BaseException:
                text = ""
            reply = {"error": [names, text[:2000]]}
        self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        frame = json.dumps(message).encode()
        if len(frame) > _MAX_FRAME:
            raise ValueError(f"a value of {len(frame)} bytes is over the limit of {_MAX_FRAME}")
        try:
            self._connection.sendall(struct.pack("!I", len(frame)) + frame)
        except OSError as error:
            raise Gone from error

    def _receive(self) -> dict[str, Any]:
        (length,) = struct.unpack("!I", self._read(4))
        if length > _MAX_FRAME:
            raise Gone
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise Gone from None
        if not isinstance(message, dict) or not {"op", "error", "value"} & set(message):
            raise Gone
        return message

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._connection.recv(count - len(parts))
            except OSError:
                part = b""
            if not part:
                raise Gone
            parts += part
        return bytes(parts)
