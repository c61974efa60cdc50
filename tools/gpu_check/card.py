"""The card and its two ceilings, measured: dense bf16 products and copies. Rows without a goal, to read others by."""

import shutil
import subprocess
import time
from collections.abc import Callable

import torch

from tools.gpu_check.rows import Row


def run(target: str, size: str) -> list[Row]:
    """Name, driver, memory, TFLOP/s, GB/s."""
    side = 8192 if size == "full" else 128
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=target) for _ in range(2))
    copied = torch.randn(1 << (30 if size == "full" else 16), device=target)
    kept = torch.empty_like(copied)
    product_s = best_s(lambda: a @ b)
    copy_s = best_s(lambda: kept.copy_(copied))
    return [
        *identity(target),
        Row("bf16 matrix product", f"{2 * side**3 / product_s / 1e12:.1f} TFLOP/s"),
        Row("copy, read and written", f"{2 * copied.nbytes / copy_s / 1e9:.0f} GB/s"),
    ]


def identity(target: str) -> list[Row]:
    """What the card and the driver call themselves."""
    rows = [Row("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}")]
    if target == "cuda":
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows.append(Row("card", f"{torch.cuda.get_device_name()}, {gib:.0f} GiB"))
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()
        rows.append(Row("driver", output[0] if output else "unknown"))
    return rows


def best_s(work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of the fastest of some calls, after one of warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
