"""Packages for a machine without network: which ones, fetching them elsewhere, unpacking them there."""

import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements-gpu.lock"
PACKAGES = (
    "megatron-core", "omegaconf", "pyyaml", "safetensors", "xxhash", "psutil", "packaging",
    "msgspec", "pytest", "pytest-timeout", "pluggy", "iniconfig", "pygments",
)  # fmt: skip
"""What parts need besides PyTorch, NumPy, Transformer Engine and vLLM, which must fit the machine's CUDA."""
GLIBC = ("2_17", "2_24", "2_26", "2_27", "2_28", "2_31")
"""manylinux tags that are taken; pip matches each of them exactly."""


def pins(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """name==version of each package, from the lock."""
    lock = LOCK.read_text()
    found = {name: re.search(rf"^{re.escape(name)}==[^ ;\n]+", lock, re.MULTILINE) for name in packages}
    missing = [name for name, match in found.items() if match is None]
    assert not missing, f"{LOCK}: lacks {missing}"
    return [match[0] for match in found.values() if match]


def download(folder: Path, python_version: str) -> int:
    """Fill a folder with the wheels for Linux x86-64 and that Python (3.12); pip's exit code."""
    platforms = [f"--platform=manylinux_{tag}_x86_64" for tag in GLIBC] + ["--platform=manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}"]
    command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--dest", str(folder), *pins()]
    return subprocess.run(command, check=False).returncode


def unpack(wheels: Path, target: Path) -> None:
    """Install the folder's wheels into a separate folder. Raises RuntimeError with pip's last line."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise RuntimeError(f"--wheels {wheels}: no .whl file there; --download DIR fetches them")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"--wheels {wheels}: {done.stderr.strip().splitlines()[-1]}")
