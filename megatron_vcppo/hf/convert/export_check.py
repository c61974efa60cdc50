"""The checks that an export must pass: names, shapes, dtypes, sizes, and the logits of a short prompt."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.safetensors_files import INDEX_NAME, check_shapes, read_folder

TOLERANCE = 1e-4
"""Largest difference of logits in float32, relative to the largest logit (at least 1)."""
TIMEOUT_S = 3600.0
_BASE_BYTES = 2 << 30


def check_export(folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises UserError if the files on disk do not hold exactly these tensors: name -> (shape, dtype)."""
    found = read_folder(folder)
    check_shapes(folder, found, {name: shape for name, (shape, _) in tensors.items()})
    wrong = [
        f"  {name}: {found[name].dtype}, should be {dtype}"
        for name, (_, dtype) in tensors.items()
        if found[name].dtype != dtype
    ]
    if wrong:
        raise UserError(f"{folder}: wrong dtypes:\n" + "\n".join(wrong))
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    index = folder / INDEX_NAME
    if index.exists():
        recorded = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
        if recorded != total:
            raise UserError(f"{index}: total_size is {recorded}, should be {total}")


def compare_logits(checkpoint: Path, exported: Path, arch: Architecture, dtype: torch.dtype | None = None) -> str:
    """Run one prompt through Megatron (TP 1, PP 1) and transformers on the CPU in float32; returns how far they differ.

    A separate process does it and holds one model at a time: 4 bytes per parameter. If the memory does not suffice,
    the comparison is skipped and the returned line reports that. ``dtype`` is what the export rounded the weights to,
    if it did. Raises UserError if the logits differ.
    """
    needed = int(4.5 * arch.parameter_count()) + _BASE_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return (
            f"logits not compared: that takes about {needed / 2**30:.0f} GiB of memory, "
            f"{available / 2**30:.0f} GiB are available"
        )
    command = [sys.executable, "-m", "megatron_vcppo.mcore.export_logits", str(checkpoint), str(exported)]
    if dtype is not None:
        command.append(str(dtype).removeprefix("torch."))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{exported}: comparing logits took longer than {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"comparing logits failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    difference, largest = result["difference"], result["largest"]
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{exported}: logits differ from Megatron's by {difference:.3g} (largest logit {largest:.3g}); not exported"
        )
    return f"logits of {result['tokens']} tokens agree with Megatron's within {difference:.1e}"
