"""One task of `vcppo doctor` per GPU node: what compiled code needs there. A marked JSON line; nothing raises."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from megatron_vcppo.slurm.marked_lines import ANSWER

DRIVER = Path("/proc/driver/nvidia/version")


def main() -> int:
    """``python -m megatron_vcppo.slurm.software_probe``."""
    found: dict[str, str | bool] = {"node": os.environ.get("SLURMD_NODENAME", "")}
    found["compiler"] = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or ""
    found["python_header"] = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    found["driver"] = driver_version()
    found["cuda"] = cuda_version()
    found["transformer_engine"], found["transformer_engine_error"] = transformer_engine()
    print(ANSWER + json.dumps(found), flush=True)
    return 0


def driver_version() -> str:
    """Of NVIDIA's kernel module; empty if there is none."""
    if DRIVER.exists() and (match := re.search(r"Module\s.*?(\d+\.\d+[\d.]*)", DRIVER.read_text())):
        return match[1]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cuda_version() -> str:
    """What torch was built for; empty for a CPU build."""
    import torch

    return torch.version.cuda or ""


def transformer_engine() -> tuple[str, str]:
    """Its version and why it cannot be used; importing the torch part loads the compiled extension."""
    try:
        package = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
        return str(package.__version__), ""
    except BaseException as error:
        return "", f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
