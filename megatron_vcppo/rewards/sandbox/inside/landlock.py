"""Landlock: a process gives up all files but some, with no privileges and no namespaces (Linux 5.13 and later)."""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from megatron_vcppo.rewards.sandbox.inside import kernel

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_FILE_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of rights to files that a version knows; later ones know 16."""
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_TCP_BIND, _TCP_CONNECT = 1, 2


def version() -> int:
    """The kernel's version of landlock; 0 if it has none or has it turned off."""
    try:
        return kernel.syscall("landlock", _CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leave this process only these files and folders with what is below them, for good.

    readable: to read and execute. writable: to do anything with. Paths that do not exist are passed over.
    TCP, and signals to processes outside, are forbidden as far as the kernel can. Raises OSError.
    """
    abi = version()
    every = (1 << _FILE_RIGHTS_OF_ABI.get(abi, 16)) - 1
    network = _TCP_BIND | _TCP_CONNECT if abi >= 4 else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if abi >= 6 else 0
    attributes = struct.pack("=QQQ", every, network, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = kernel.syscall("landlock", _CREATE, attributes, len(attributes), 0)
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    for rights, paths in ((reading, readable), (every, writable)):
        for path in paths:
            _allow(rules, path, rights & every)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.syscall("landlock", _RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _FILE_RIGHTS
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
    kernel.syscall(f"landlock {path}", _ADD, rules, 1, rule, 0)
    os.close(descriptor)
