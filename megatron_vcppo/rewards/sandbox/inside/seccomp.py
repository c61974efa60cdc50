"""A filter of system calls for one program: no other processes, no network, nothing that reaches beyond it.

A program gets no second process, so its limits of memory and time are those of all that it does, and ending it ends
everything; threads are free. What is denied fails with "operation not permitted", as in programs without rights.
"""

import ctypes
import errno
import os
import struct

from megatron_vcppo.rewards.sandbox.inside import kernel

NUMBERS = {
    # name: (x86_64, aarch64); None where the architecture has no such call
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prctl": (157, 167),
    "fcntl": (72, 25), "ioctl": (16, 29), "prlimit64": (302, 261), "seccomp": (317, 277),
}  # fmt: skip
"""Calls of which some uses are denied."""
DENIED = {
    # processes
    "fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setaffinity": (203, 122),
    # network and what can stand in for it
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # memory that is not the process's own
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # changes to files that landlock does not judge
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45), "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # the system
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "acct": (163, 89),
    "syslog": (103, 116), "quotactl": (179, 60), "quotactl_fd": (443, 443), "iopl": (172, None),
    "ioperm": (173, None), "personality": (135, 92), "uselib": (134, None), "modify_ldt": (154, None),
}  # fmt: skip
_NEWEST = 451
"""Later calls (cachestat is the last that is allowed) do not exist for a program: nobody has judged them."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_…
_CLONE_THREAD = 0x10000
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15  # would let a file send signals to other processes
_FIOSETOWN, _SIOCSPGRP, _TIOCSTI = 0x8901, 0x8902, 0x5412
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_KILL, _DENY, _NO_SUCH_CALL, _ALLOW = 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x7FFF0000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def supported() -> bool:
    """Whether there is a table for this processor."""
    return kernel.machine() in _ARCHITECTURES


def restrict() -> None:
    """Put the filter on this process, for good, and on all its threads to come. Raises OSError if it cannot be."""
    if not supported():
        raise OSError(errno.ENOSYS, f"no seccomp filter for {kernel.machine()}")
    program = b"".join(_program(os.getpid()))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    argument = ctypes.byref(Program(len(program) // 8, program))
    kernel.syscall("seccomp", _number("seccomp"), 1, 0, argument)


def _number(name: str) -> int:
    number = NUMBERS[name][_ARCHITECTURES[kernel.machine()][0]]
    assert number is not None
    return number


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def _program(pid: int) -> list[bytes]:
    """The filter, in classic BPF: an instruction is (code, jump if true, jump if false, value)."""
    column, architecture = _ARCHITECTURES[kernel.machine()]
    do = _instruction
    deny, allow = do(_RETURN, _DENY), do(_RETURN, _ALLOW)

    def argument(index: int) -> bytes:
        """Load the lower half of an argument; the upper one holds nothing for pids, commands and flags."""
        return do(_LOAD, _FIRST_ARGUMENT + 8 * index)

    def case(name: str, *body: bytes) -> list[bytes]:
        return [do(_EQUAL, _number(name), 0, len(body)), *body]

    def unless(index: int, allowed: list[int]) -> list[bytes]:
        """Deny unless the argument is one of these."""
        tests = [do(_EQUAL, value, len(allowed) - place, 0) for place, value in enumerate(allowed)]
        return [argument(index), *tests, deny, allow]

    def denied_if(index: int, values: list[int]) -> list[bytes]:
        tests = [do(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
        return [argument(index), *tests, allow, deny]

    lines = [
        do(_LOAD, _ARCHITECTURE),
        do(_EQUAL, architecture, 1, 0),
        do(_RETURN, _KILL),
        do(_LOAD, _NUMBER),
        do(_GREATER, _NEWEST, 0, 1),  # the calls of x32 too, whose numbers start at 2^30
        do(_RETURN, _NO_SUCH_CALL),
        # The flags of clone3 are in memory, where a filter cannot look; the C library falls back on clone.
        *case("clone3", do(_RETURN, _NO_SUCH_CALL)),
        *case("clone", argument(0), do(_ANY_BIT, _CLONE_THREAD, 1, 0), deny, allow),
        *case("kill", *unless(0, [pid])),
        *case("tgkill", *unless(0, [pid])),
        *case("prlimit64", *unless(0, [0, pid])),
        *case("prctl", *denied_if(0, [kernel.PR_SET_PDEATHSIG])),
        *case("fcntl", *denied_if(1, [_F_SETOWN, _F_SETSIG, _F_SETOWN_EX])),
        *case("ioctl", *denied_if(1, [_FIOSETOWN, _SIOCSPGRP, _TIOCSTI])),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            lines += [do(_EQUAL, number, 0, 1), deny]
    return [*lines, allow]
