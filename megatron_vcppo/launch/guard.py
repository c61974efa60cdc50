"""Runs one command so that nothing of it is ever left behind: ``python -I -S guard.py COMMAND…`` (Linux, stdlib only).

The guard stands between the controller and a role's process. It is a subreaper, so a grandchild that detaches itself
(an engine's worker, a data loader) stays its descendant. Two things make it kill every descendant: its command ended,
or its standard input closed, which is what happens when the controller dies, by SIGKILL too (not with ``--alone`` in
front: inside an srun step Slurm itself sees to that). A byte on its standard input is a signal to pass on. It is
started by path, so that it costs a bare interpreter (about 20 ms) and no import of the package; launch/preloaded.py
forks itself to be one.
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
GUARD_ARGUMENTS = ("-I", "-S", __file__)
"""To be put between an interpreter and the command."""


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


class Guard:
    """This process as a guard: ``fork`` its child, then ``watch`` it."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        signal.set_wakeup_fd(self.writing)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        self.child = 0

    def fork(self) -> bool:
        """True in the child, whose signals are as in a new process and whose standard input is empty."""
        guard = os.getpid()
        self.child = os.fork()
        if self.child:
            self._close_others()
            return False
        die_with_parent()
        if os.getppid() != guard:  # killed before the kernel was asked
            os._exit(128 + signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        os.close(self.reading)
        os.close(self.writing)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        return True

    def _close_others(self) -> None:
        """What this process was started with is held by the child alone, so that who waits for its end sees it."""
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, self.reading, self.writing):
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))

    def watch(self, alone: bool = False) -> int:
        """Until the child ends or, unless alone, standard input closes; the exit code, 128 + signal after a signal."""
        for number in FORWARDED:
            signal.signal(number, lambda received, _: self._pass_on(received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        while True:
            ready = select.select([self.reading] if alone else [0, self.reading], [], [])[0]
            if self.reading in ready:
                os.read(self.reading, 4096)
                try:
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        if ended[0] == self.child:
                            kill_descendants()
                            code = os.waitstatus_to_exitcode(ended[1])
                            return code if code >= 0 else 128 - code
                except ChildProcessError:
                    return 1
            if 0 in ready:
                if not (byte := os.read(0, 1)):
                    kill_descendants()
                    return 128 + signal.SIGKILL
                self._pass_on(byte[0])

    def _pass_on(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has been reaped, and its exit code is still to be reported
            os.kill(self.child, number)


def execute(command: list[str]) -> None:
    """Become ``command``; exit code 127 if there is no such program."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def main() -> int:
    """Run the command of ``sys.argv``; returns its exit code, 128 + signal when a signal ended it."""
    alone = sys.argv[1] == ALONE
    guard = Guard()
    if guard.fork():
        execute(sys.argv[2 if alone else 1 :])
    return guard.watch(alone)


if __name__ == "__main__":
    sys.exit(main())
