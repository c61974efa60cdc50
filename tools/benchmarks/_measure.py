"""Shared by benchmarks: fair timing of several functions on a noisy machine, and the memory that one takes."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def time_together(
    functions: Mapping[str, Callable[[], object]], repeats: int, max_seconds: float = 20.0
) -> dict[str, dict[str, float]]:
    """name -> {best_ms, median_ms, cpu_ms}: each function once per round, so that all meet the same disturbances.

    cpu_ms: the least processor time of the whole process, all its threads added; a busy machine disturbs it less.

    Stops after ``repeats`` rounds or ``max_seconds``, but not before three rounds. One warm-up round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    cpu_times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            result = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - began)
                cpu_times[name].append(time.process_time() - cpu_began)
            # Freed outside the timing, or the first function would pay for the last one's memory.
            del result
        if round_number >= 3 and time.perf_counter() - start > max_seconds:
            break
    return {
        name: {
            "best_ms": round(1e3 * min(t), 3),
            "median_ms": round(1e3 * statistics.median(t), 3),
            "cpu_ms": round(1e3 * min(cpu_times[name]), 3),
        }
        for name, t in times.items()
    }


def keep_freed_memory() -> None:
    """Tell the C library (glibc) to hand freed memory out again instead of returning it to the system.

    Otherwise page faults of fresh memory, microseconds each on a virtual machine, hit one function by chance and
    spare another.
    """
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 25)
    libc.mallopt(trim_threshold, 1 << 30)


def peak_bytes(function: Callable[[], object]) -> int:
    """How much this process's memory (Linux: resident set) rises at most while ``function`` runs."""
    # "5" lowers the high-water mark to the present size.
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = status_bytes("VmRSS")
    result = function()
    peak = status_bytes("VmHWM")
    del result
    return peak - before


def status_bytes(key: str) -> int:
    """A size of this process by its name in /proc/self/status: VmRSS now, VmHWM at its highest."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
