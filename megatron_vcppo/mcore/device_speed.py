"""What this rank's device could compute at most, and what memory it has taken."""

import resource
import time

import torch

PEAK_TFLOPS = {
    "B300": 2250, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "RTX PRO 6000": 504, "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165,
}  # fmt: skip
"""Data-sheet TFLOP/s in bf16 with float32 accumulation, without sparsity, by a part of the device's name; the first
that fits counts. FP8 runs are compared with the same peak."""
GIB = 1 << 30


def peak_tflops(name: str) -> float | None:
    """Of a GPU, by the name that PyTorch gives it; None if the table lacks it."""
    return next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def matrix_flops(size: int, dtype: torch.dtype, repeats: int = 8) -> float:
    """FLOP/s of this process on the CPU, by the best of a few products of square matrices."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def device_peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one rank: a GPU's data sheet (None: not in the table), or products on the CPU, some milliseconds."""
    if device.type == "cuda":
        return peak_tflops(torch.cuda.get_device_name(device))
    return matrix_flops(512, dtype) / 1e12


def peak_memory_gib(device: torch.device) -> float:
    """Most that tensors took on a GPU since the last call; most that the process ever held on a CPU."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
