"""A separate root: namespaces for users, mounts, processes, network and IPC, with what a program may see bound in."""

import contextlib
import errno
import os
import struct
from collections.abc import Callable

from megatron_vcppo.rewards.sandbox.inside import kernel

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 0x1000, 0x4000, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = (1 << 64) - 100, 0x8000
DEVICES = ("null", "zero", "full", "random", "urandom")
_OLD = "/.old"
NOBODY = 65534


def enter(parent: int, readable: list[str], scratch: str, scratch_bytes: int, scratch_files: int) -> None:
    """Become process 1 of new namespaces, as an ordinary user without capabilities; the caller waits for it outside.

    readable: files and folders that keep their places, read-only; symbolic links are copied. scratch: an empty folder
    in memory of this many bytes and files, the only one that can be written; ``/tmp`` leads to it. Whoever kills the
    process that waits, which ends with its own parent, kills this one and all in it. Raises OSError where the system
    does not allow namespaces.
    """
    is_root, user, group = os.getuid() == 0, os.getuid(), os.getgid()
    kernel.unshare(_NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (0 if is_root else _NEWUSER))
    if not is_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    kernel.die_with_parent(parent)  # again: the kernel forgets it whenever a process's credentials change
    outside_lives = _become_first_process()
    owner = NOBODY if is_root else user
    _build_root(readable, scratch, f"size={scratch_bytes},nr_inodes={scratch_files},mode=700,uid={owner}")
    if is_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    if not outside_lives():
        os._exit(1)


def _become_first_process() -> Callable[[], bool]:
    """The caller waits for a child, which returns from here; the result tells whether the caller still lives."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(read_end)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(write_end)
    os.set_blocking(read_end, False)

    def outside_lives() -> bool:
        try:
            return os.read(read_end, 1) != b""
        except BlockingIOError:  # nothing to read, but somebody holds the other end
            return True
        finally:
            os.close(read_end)

    return outside_lives


def _build_root(readable: list[str], scratch: str, options: str) -> None:
    kernel.mount("none", "/", flags=_REC | _PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"/tmp{_OLD}", 0o700)
    kernel.syscall("pivot_root", _SYS_PIVOT_ROOT[kernel.machine()], b"/tmp", f"/tmp{_OLD}".encode())
    os.chdir("/")
    for path in sorted(readable):
        _show(path)
    os.mkdir("/dev")
    for name in DEVICES:
        _show(f"/dev/{name}", read_only=False)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.mkdir("/proc")
    with contextlib.suppress(OSError):  # some containers allow no new view of processes; programs go without
        kernel.mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC, "hidepid=2")
    os.mkdir(scratch)
    kernel.mount("tmpfs", scratch, "tmpfs", _NOSUID | _NODEV, options)
    if not os.path.lexists("/tmp"):
        os.symlink(scratch, "/tmp")
    kernel.unmount_lazily(_OLD)
    os.rmdir(_OLD)
    _make_read_only("/", recursive=False)


def _show(path: str, read_only: bool = True) -> None:
    """Bind a file or folder of the old root at its own place in the new one."""
    old = _OLD + path
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path, 0o755)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(old, path, flags=_BIND | _REC)
    if read_only:
        _make_read_only(path, recursive=True)


def _make_read_only(path: str, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    try:
        kernel.syscall("mount_setattr", _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, 32)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise OSError(error.errno, "mount_setattr: needs Linux 5.12") from error
        raise
