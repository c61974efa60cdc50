"""System calls that Python does not offer: processes that die with their parent, capabilities, mounts, namespaces."""

import ctypes
import os

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_CAPBSET_DROP = 24
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def machine() -> str:
    """The processor's architecture, as the tables of system calls name it."""
    return os.uname().machine


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    """A raw system call. Whole numbers are passed as 64 bits. Raises OSError that starts with ``what``."""
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def die_with_parent(parent: int) -> None:
    """This process is killed when its parent is gone, which is ``parent``; at once if that is gone already."""
    prctl(PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def drop_privileges() -> None:
    """No capability is left, and nothing that is executed can win one."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # without privileges there is nothing to drop; past the last capability there is none
            break
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    syscall("capset", _SYS_CAPSET[machine()], header, (ctypes.c_uint32 * 6)())


def unshare(flags: int) -> None:
    """Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError that names the target."""
    texts = [text.encode() or None for text in (source, target, kind)]
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def unmount_lazily(target: str) -> None:
    """Raises OSError."""
    _check(_libc.umount2(target.encode(), 2), f"umount {target}")
