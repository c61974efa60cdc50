"""The tests' side: statements with asserts, executed where the program cannot reach, on stand-ins for its objects.

A stand-in forwards calls, attributes and items, but never a comparison with plain data nor arithmetic with it: an
object of the program's own that equals everything equals nothing here, and no method of it learns what is expected.
"""

import ast
import builtins
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_vcppo.rewards.sandbox.inside.peer import Gone, Peer

_BUILTIN_NAMES = frozenset(dir(builtins)) | {"isclose", "Counter", "defaultdict", "deque", "Decimal", "Fraction"}
"""Built-in names, and others that tests compare with and often do not import."""
_LIBRARIES = sys.stdlib_module_names | {"numpy"}
_ALIASES = {"np": "numpy"}


def run(job: dict[str, Any], names: dict[str, Any], connection: socket.socket, result: int) -> None:
    """Run ``job["tests"]`` in order; writes {"nonce", "failed"} as JSON to the descriptor ``result`` at the end.

    failed: None if all have passed, else the number of the test from 1 and what happened.
    """
    tests = [compile(text, f"<test {number}>", "exec") for number, text in enumerate(job["tests"], start=1)]
    peer = Peer(connection, {"call": _called_back}, _refer, _resolve, _remote_error)
    failed: list[Any] | None = None
    number = 1
    try:
        namespace = {**names, "__name__": "tests", **_program_names(peer, job["tests"])}
        for code in tests:
            exec(code, namespace)
            number += 1
    except Gone:
        failed = [number, "the program ended"]
    except AssertionError as error:
        failed = [number, "assertion failed" + (f": {error}" if str(error) else "")]
    except BaseException as error:
        failed = [number, f"{type(error).__name__}: {error}"]
    if failed:
        failed[1] = failed[1][:300]
    os.write(result, json.dumps({"nonce": job["nonce"], "failed": failed}).encode())


def free_names(texts: list[str]) -> tuple[set[str], set[str]]:
    """Names that the tests read and the program has to give, and names of libraries that they use without an import.

    Which names are the program's is a property of the tests: one that hides a built-in is taken from the program only
    if the tests read no other, so that no program puts its own ``abs`` or ``sorted`` between its result and the test.
    """
    trees = [ast.parse(text) for text in texts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    bases = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    libraries = {name for name in (read & bases) - called - bound if _ALIASES.get(name, name) in _LIBRARIES}
    wanted = read - bound - libraries
    return (wanted - _BUILTIN_NAMES or wanted & called), libraries


def _program_names(peer: Peer, texts: list[str]) -> dict[str, Any]:
    wanted, libraries = free_names(texts)
    namespace: dict[str, Any] = {}
    for name, found in peer.ask("names", wanted=sorted(wanted)).items():
        if name not in wanted:
            continue
        if "module" in found:
            libraries.add(name)
        elif "exception" in found:
            namespace[name] = _exception_class([str(kind) for kind in found["exception"]])
        else:
            namespace[name] = peer.decode(found["value"])
    for name in libraries:
        module = _ALIASES.get(name, name)
        if module in _LIBRARIES:
            namespace[name] = importlib.import_module(module)
    return namespace


_exceptions: dict[str, type[Exception]] = {}


def _exception_class(kinds: list[str]) -> type[Exception]:
    """A class of the tests' own for an exception of the program's, below the same built-in one."""
    if kinds[0] not in _exceptions:
        _exceptions[kinds[0]] = type(kinds[0], (_builtin_exception(kinds),), {})
    return _exceptions[kinds[0]]


def _builtin_exception(kinds: list[str]) -> type[Exception]:
    for kind in kinds:
        known = getattr(builtins, kind, None)
        if isinstance(known, type) and issubclass(known, Exception):
            return known
    return RuntimeError  # an exit, which must not end the tests


def _remote_error(kinds: list[str], text: str) -> BaseException:
    known = next((_exceptions[kind] for kind in kinds if kind in _exceptions), None) or _builtin_exception(kinds)
    if known is RuntimeError and kinds[0] != "RuntimeError":
        text = f"{kinds[0]}: {text}"
    try:
        return known(text)
    except TypeError:  # such as UnicodeDecodeError, which wants five arguments
        return RuntimeError(f"{kinds[0]}: {text}")


def _called_back(peer: Peer, on: int, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"result": peer.encode(peer.kept(on)(*(peer.decode(data) for data in args)))}


def _refer(peer: Peer, value: Any) -> dict[str, Any]:
    if isinstance(value, Remote):
        return {"r": object.__getattribute__(value, "_number")}
    if callable(value) and not isinstance(value, type):
        return {"o": peer.keep(value)}
    raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data and functions can be")


def _resolve(peer: Peer, kind: str, content: Any) -> Any:
    if kind == "r":  # a function of ours comes back
        return peer.kept(content)
    if kind != "o" or not isinstance(content, int):
        raise ValueError(f"a value of the unknown kind {kind!r}")
    return Remote(peer, content)


def _update(value: Any, after: Any) -> None:
    """What a call has done to its argument."""
    if isinstance(value, list | bytearray) and type(after) is type(value):
        value[:] = after
    elif isinstance(value, dict | set) and type(after) is type(value):
        value.clear()
        value.update(after)


class Remote:
    """An object of the program's that is not plain data."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, op: str, **arguments: Any) -> Any:
        return object.__getattribute__(self, "_peer").ask(op, on=object.__getattribute__(self, "_number"), **arguments)

    def _apply(self, function: str, *args: Any) -> Any:
        peer = object.__getattribute__(self, "_peer")
        return peer.decode(self._ask("apply", function=function, args=[peer.encode(value) for value in args]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object in the program; arguments that the call changed there are changed here too."""
        peer = object.__getattribute__(self, "_peer")
        reply = self._ask(
            "call",
            args=[peer.encode(value) for value in args],
            kwargs={name: peer.encode(value) for name, value in kwargs.items()},
        )
        for place, after in reply["changed"].items():
            _update(args[int(place)], peer.decode(after))
        return peer.decode(reply["result"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return object.__getattribute__(self, "_peer").decode(self._ask("get", name=name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name=name, value=object.__getattribute__(self, "_peer").encode(value))

    def __iter__(self) -> Iterator[Any]:
        items = object.__getattribute__(self, "_peer").decode(self._ask("iterate"))
        return iter(items) if not isinstance(items, Remote) else _RemoteIterator(items)

    def __len__(self) -> int:
        length = self._apply("len")
        if type(length) is not int:
            raise TypeError("len() of the program's object is no number")
        return length

    def __bool__(self) -> bool:
        return self._apply("bool") is True

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __str__(self) -> str:
        text = self._apply("str")
        return text if isinstance(text, str) else ""

    def __repr__(self) -> str:
        text = self._apply("repr")
        return text if isinstance(text, str) else ""

    def __getitem__(self, key: Any) -> Any:
        return self._apply("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._apply("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._apply("delitem", key)

    def __eq__(self, other: object) -> bool:
        return self._apply("eq", other) is True if isinstance(other, Remote) else False

    def __ne__(self, other: object) -> bool:
        return self._apply("ne", other) is True if isinstance(other, Remote) else True


class _RemoteIterator:
    def __init__(self, items: Remote) -> None:
        self._items = items

    def __iter__(self) -> "_RemoteIterator":
        return self

    def __next__(self) -> Any:
        peer = object.__getattribute__(self._items, "_peer")
        for data in self._items._ask("next"):
            return peer.decode(data)
        raise StopIteration


def _between_remotes(function: str) -> Callable[[Remote, object], Any]:
    """A binary operator that is defined between two objects of the program only."""

    def method(self: Remote, other: object) -> Any:
        return self._apply(function, other) if isinstance(other, Remote) else NotImplemented

    return method


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "matmul"):
    setattr(Remote, f"__{_name}__", _between_remotes(_name))
