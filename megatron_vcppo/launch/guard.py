"""Runs one command so that nothing of it is ever left behind: ``python -I -S guard.py COMMAND…`` (Linux, stdlib only).

The guard stands between the controller and a role's process. It is a subreaper, so a grandchild that detaches itself
(an engine's worker, a data loader) stays its descendant. Two things make it kill every descendant: its command ended,
or its standard input closed, which is what happens when the controller dies, by SIGKILL too (not with ``--alone`` in
front: inside an srun step Slurm itself sees to that). It is started by path, so that it costs a bare interpreter
(about 20 ms) and no import of the package.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ALONE = "--alone"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def descendants(root: int) -> list[int]:
    """Process ids below ``root``, from /proc; processes that vanish meanwhile are skipped."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as status:
                    parent = int(status.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found, frontier = [], [root]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, ())]
        found += frontier
    return found


def kill_descendants() -> None:
    """SIGKILL everything below this process until nothing is left; reaps on the way."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        select.select([], [], [], 0.01)


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent dies; run/processes.py cannot be imported here."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: list[str]) -> int:
    """Fork and execute ``command``; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    die_with_parent()
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def main() -> int:
    """Run the command of ``sys.argv``; returns its exit code, 128 + signal when a signal ended it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    alone = sys.argv[1] == ALONE
    child = start(sys.argv[2 if alone else 1 :])
    for number in FORWARDED:
        signal.signal(number, lambda received, _: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    while True:
        ready = select.select([reading] if alone else [0, reading], [], [])[0]
        if reading in ready:
            os.read(reading, 4096)
            try:
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == child:
                        kill_descendants()
                        code = os.waitstatus_to_exitcode(ended[1])
                        return code if code >= 0 else 128 - code
            except ChildProcessError:
                return 1
        if 0 in ready and not os.read(0, 1):
            kill_descendants()
            return 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main())
