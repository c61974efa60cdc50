"""The program's side: it is loaded as a script, for calls of one function, or to serve the tests of another process."""

import builtins
import json
import operator
import os
import socket
import sys
import types
from typing import Any

from megatron_vcppo.rewards.sandbox.inside import plain
from megatron_vcppo.rewards.sandbox.inside.peer import Peer

_PREAMBLE = """
from bisect import *
from collections import *
from copy import deepcopy
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import *
from heapq import *
from io import BytesIO, StringIO
from itertools import *
from math import *
from operator import itemgetter, mul, xor
from random import choice, randint, shuffle
from typing import *
import bisect, collections, copy, datetime, decimal, fractions, functools, heapq, io, itertools, json, math, operator
import os, random, re, statistics, string, sys, time, typing
"""
"""Imports that data sets of such problems take for granted: programs get the names, and may bind them otherwise."""
_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "matmul", "neg")},
    "bool": bool,
    "len": len,
    "str": str,
    "repr": repr,
    "hash": hash,
}


def preamble() -> dict[str, Any]:
    """The names of the preamble, imported once, before there is a program; none hides a built-in (``math.pow``)."""
    names: dict[str, Any] = {}
    exec(_PREAMBLE, names)
    return {name: value for name, value in names.items() if not hasattr(builtins, name) and name != "__builtins__"}


def load(source: str, module_name: str, names: dict[str, Any], setup: str = "") -> types.ModuleType:
    """Execute a program as a module. Raises whatever it raises."""
    module = types.ModuleType(module_name)
    module.__dict__.update(names, __file__="solution.py")
    sys.modules[module_name] = module
    for text in filter(None, (setup, source)):
        exec(compile(text, "solution.py", "exec", dont_inherit=True), module.__dict__)
    return module


def run_script(source: str, names: dict[str, Any]) -> None:
    """The program reads standard input, prints, and ends as a script does."""
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w")):
        stream = open(descriptor, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["solution.py"]
    load(source, "__main__", names)


def run_calls(job: dict[str, Any], names: dict[str, Any], result: int) -> None:
    """Call ``fn_name`` with each of the inputs; a line of JSON for each goes to the file descriptor ``result``."""
    function = _function(load(job["program"], "solution", names, job.get("setup", "")), job["fn_name"])
    for arguments in job["inputs"]:
        value = plain.encode(function(*arguments), _refuse)
        os.write(result, json.dumps(value).encode() + b"\n")


def _function(module: types.ModuleType, name: str) -> Any:
    """A method of ``class Solution``, as LeetCode has it, or a function of the program."""
    solution = module.__dict__.get("Solution")
    return getattr(solution(), name) if solution is not None and hasattr(solution, name) else module.__dict__[name]


def _refuse(value: Any) -> dict[str, Any]:
    raise TypeError(f"a result of type {type(value).__name__} is not plain data")


def serve_tests(job: dict[str, Any], names: dict[str, Any], connection: socket.socket) -> None:
    """Load the program, then do what the tests' process asks until it ends."""

    def refer(peer: Peer, value: Any) -> dict[str, Any]:
        return {"r": value.number} if isinstance(value, _Callback) else {"o": peer.keep(value)}

    def resolve(peer: Peer, kind: str, content: Any) -> Any:
        if kind == "r":  # one of ours comes back
            return peer.kept(content)
        return _Callback(peer, content)

    peer = Peer(connection, _OPERATIONS, refer, resolve, lambda kinds, text: RuntimeError(text))
    module: types.ModuleType | None = None

    def names_of_program(peer: Peer, wanted: list[str]) -> dict[str, Any]:
        nonlocal module
        module = module or load(job["program"], "solution", names, job.get("setup", ""))
        found = {name: module.__dict__[name] for name in wanted if name in module.__dict__}
        own = {name: value for name, value in found.items() if not (name in names and value is names[name])}
        return {name: _described(peer, value) for name, value in own.items()}

    _OPERATIONS["names"] = names_of_program
    peer.serve()


class _Callback:
    """A function of the tests that was passed to the program."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self.number = peer, number

    def __call__(self, *args: Any) -> Any:
        encoded = [self._peer.encode(value) for value in args]
        return self._peer.decode(self._peer.ask("call", on=self.number, args=encoded, kwargs={})["result"])


def _described(peer: Peer, value: Any) -> dict[str, Any]:
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if isinstance(value, type) and issubclass(value, Exception):
        return {"exception": [kind.__name__ for kind in value.__mro__], "value": {"o": peer.keep(value)}}
    return {"value": peer.encode(value)}


def _call(peer: Peer, on: int, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The result, and the arguments that the call has changed in place, by position."""
    values = [peer.decode(data) for data in args]
    result = peer.kept(on)(*values, **{name: peer.decode(data) for name, data in kwargs.items()})
    changed = {}
    for place, (value, before) in enumerate(zip(values, args)):
        if isinstance(value, list | dict | set | bytearray) and (after := peer.encode(value)) != before:
            changed[str(place)] = after
    return {"result": peer.encode(result), "changed": changed}


def _get(peer: Peer, on: int, name: str) -> Any:
    return peer.encode(getattr(peer.kept(on), name))


def _set(peer: Peer, on: int, name: str, value: Any) -> None:
    setattr(peer.kept(on), name, peer.decode(value))


def _apply(peer: Peer, on: int, function: str, args: list[Any]) -> Any:
    """One of the functions below, the object first."""
    return peer.encode(_FUNCTIONS[function](peer.kept(on), *(peer.decode(data) for data in args)))


def _iterate(peer: Peer, on: int) -> dict[str, Any]:
    return {"o": peer.keep(iter(peer.kept(on)))}


def _next(peer: Peer, on: int) -> Any:
    """A list of the next item, empty at the end."""
    for item in peer.kept(on):
        return [peer.encode(item)]
    return []


_OPERATIONS: dict[str, Any] = {
    "call": _call, "get": _get, "set": _set, "apply": _apply, "iterate": _iterate, "next": _next,
}  # fmt: skip
