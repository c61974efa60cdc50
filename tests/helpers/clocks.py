"""Nodes of the test cluster whose clocks are wrong: a library that shifts what a process takes for the time of day.

Only the wall clock is shifted, as on a node without NTP: waits go by the monotonic clock, and the times of files are
those of the file system.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    const char *seconds = getenv("CLOCK_SHIFT_S");
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    long result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return (int)result;
}

int gettimeofday(struct timeval *now, void *zone) {
    long result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0) now->tv_sec += shift();
    return (int)result;
}

time_t time(time_t *now) {
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    if (now) *now = real.tv_sec;
    return real.tv_sec;
}
"""


def has_compiler() -> bool:
    return shutil.which("cc") is not None


def python_with_clocks(folder: Path, shifts: Mapping[str, float]) -> Path:
    """An interpreter like this one whose clock is ahead by that many seconds on these nodes of a Slurm cluster."""
    source, library, python = folder / "clock.c", folder / "clock.so", folder / "python"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    cases = "\n".join(f"    {node}) export CLOCK_SHIFT_S={seconds:.0f} ;;" for node, seconds in shifts.items())
    lines = [
        "#!/bin/sh",
        'case "$SLURMD_NODENAME" in',
        cases,
        "esac",
        f"export LD_PRELOAD={shlex.quote(str(library))}",
        f'exec {shlex.quote(sys.executable)} "$@"',
    ]
    python.write_text("\n".join(lines) + "\n")
    python.chmod(0o755)
    return python
