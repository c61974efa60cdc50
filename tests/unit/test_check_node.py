"""tools/check_node.sh and tools/setup.sh gpu: what they decide from what a node says of itself.

The programs that say it are stand-ins; nothing is installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("awk", "bash", "cut", "dirname", "grep", "head", "sed", "sort")
GOOD = {
    "uname": 'case $1 in -s) echo Linux ;; -m) echo x86_64 ;; esac',
    "getconf": "echo glibc 2.35",
    "nvidia-smi": "echo 580.82.07; echo 580.82.07",
    "g++": "echo 11.4.0",
    "df": "echo header; echo /dev/sda 200000000 100000000 100000000 50% /",
}  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A copy of the script and the lock, and a folder of programs that is the whole PATH."""
    for name in ("tools/check_node.sh", "requirements-gpu.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in NEEDED:
        path = shutil.which(name)
        assert path
        (programs / name).symlink_to(path)
    for name, body in GOOD.items():
        put(tmp_path, name, body)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    put(tmp_path, "python3", f"echo {tmp_path}/include")
    return tmp_path


def put(node: Path, name: str, body: str) -> None:
    program = node / "bin" / name
    program.unlink(missing_ok=True)
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def check(node: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(node / "bin" / "bash"), "tools/check_node.sh", *arguments]
    env = {"PATH": str(node / "bin"), **environment}
    return subprocess.run(command, cwd=node, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_good_node_is_one_line(node: Path) -> None:
    done = check(node)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "setup: node: Linux x86_64, glibc 2.35, driver 580.82.07, g++ 11.4.0, Python headers of python3, 100 GB free\n"
    )


FAULTS = {
    "architecture": ("uname", 'case $1 in -s) echo Linux ;; -m) echo aarch64 ;; esac',
                     "platform: Linux aarch64; the GPU packages are pinned for Linux x86_64"),
    "old glibc": ("getconf", "echo glibc 2.28", "glibc: 2.28 is older than 2.31 (Ubuntu 20.04, RHEL 9): use a newer"),
    "musl": ("getconf", "exit 1", "glibc: none (a musl system?); glibc 2.31 or newer is needed: use tools/containers"),
    "old driver": ("nvidia-smi", "echo 580.82.07; echo 570.124.06",
                   "driver: 570.124.06 is too old for CUDA 13: 580 or newer is needed"),
    "no compiler": ("g++", "exit 127", "compiler: no g++: install g++ 11 to 16 or set CXX"),
    "old compiler": ("g++", "echo 9.4.0", "compiler: g++ is 9.4.0; PyTorch and CUDA take 11 to 16: install"),
    "new compiler": ("g++", "echo 17.0.1", "compiler: g++ is 17.0.1; PyTorch and CUDA take 11 to 16"),
    "Python headers": ("python3", "echo /nowhere", "Python headers: no /nowhere/Python.h: install python3-dev"),
    "disk": ("df", "echo header; echo /dev/sda 200000000 190000000 10000000 95% /", "disk: 10 GB free in"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_what_to_do(node: Path, fault: str) -> None:
    program, body, message = FAULTS[fault]
    put(node, program, body)
    done = check(node)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"setup: error: {message}")


@pytest.mark.parametrize(("version", "good"), [("11.0.0", True), ("16.2.0", True), ("10.5.0", False)])
def test_the_compiler_s_limits(node: Path, version: str, good: bool) -> None:
    put(node, "my-g++", f"echo {version}")
    put(node, "g++", "exit 127")
    assert (check(node, CXX="my-g++").returncode == 0) == good


def test_all_faults_are_said_at_once(node: Path) -> None:
    for program, body, _ in FAULTS.values():
        put(node, program, body)
    assert len(check(node).stderr.splitlines()) == len(GOOD) + 1


def test_no_driver_on_a_login_node_is_a_note(node: Path) -> None:
    put(node, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    done = check(node)
    assert done.returncode == 0
    assert "no NVIDIA driver here: compute nodes need 580 or newer for CUDA 13" in done.stdout


def test_the_driver_follows_the_lock(node: Path) -> None:
    lock = node / "requirements-gpu.lock"
    lock.write_text("nvidia-cuda-runtime==12.8.90 ; sys_platform == 'linux'\n")
    put(node, "nvidia-smi", "echo 570.124.06")
    assert check(node).returncode == 0
    lock.write_text("nvidia-cuda-runtime==14.0.1\n")
    assert "CUDA '14', whose driver tools/check_node.sh does not know" in check(node).stderr


def test_a_finished_environment_needs_no_more_disk(node: Path) -> None:
    put(node, "df", FAULTS["disk"][1])
    (node / ".venv").mkdir()
    (node / ".venv" / "setup.stamp").touch()
    assert check(node).returncode == 0


def test_the_interpreter_s_own_headers_count(node: Path) -> None:
    put(node, "python3", "exit 1")
    put(node, "python3.12", f"echo {node}/include")
    assert check(node).returncode == 2
    assert check(node, "python3.12").returncode == 0


def test_what_is_no_interpreter_is_named(node: Path) -> None:
    result = check(node, "gpu")
    assert result.returncode == 2
    assert "setup: error: Python: 'gpu' is no Python interpreter: give the path of Python 3.11" in result.stderr
    assert "Python.h" not in result.stderr


def test_setup_gpu_stops_before_anything_is_made_or_lost(node: Path) -> None:
    for name in ("tools/setup.sh", "requirements-gpu.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, node / name)
    (node / ".venv").mkdir()
    (node / ".venv" / "setup.stamp").write_text("cpu 0123 elsewhere\n")
    put(node, "getconf", "echo glibc 2.28")
    python = os.environ.get("PYTHON") or shutil.which("python3.12") or shutil.which("python3.11")
    assert python
    env = os.environ | {"PATH": f"{node}/bin:{os.environ['PATH']}", "PYTHON": python}
    command = ["bash", "tools/setup.sh", "gpu"]
    done = subprocess.run(command, cwd=node, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "setup: error: glibc: 2.28 is older" in done.stderr
    assert (node / ".venv" / "setup.stamp").read_text().startswith("cpu"), "the environment for cpu is still there"
    assert "installing" not in done.stdout


PYTHON = """
case "$*" in
*get_path*) echo "$NODE/include" ;;
"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/vcppo" ;;
"-m pip"*) echo "$* | ${PATH%%:*} ${NVTE_BUILD_USE_NVIDIA_WHEELS:-} ${MAX_JOBS:-}" >>"$NODE/pip.log" ;;
esac
"""
"""Takes part in tools/setup.sh without installing anything, and writes down pip's arguments and environment."""


def test_the_extension_is_built_with_the_wheels_headers_and_ninja(node: Path) -> None:
    for name in ("tools/setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, node / name)
    put(node, "python3.11", PYTHON)
    put(node, "df", GOOD["df"])
    env = os.environ | {"PATH": f"{node}/bin:{os.environ['PATH']}", "NODE": str(node), "PYTHON": "python3.11"}
    env = {name: value for name, value in env.items() if name not in ("MAX_JOBS", "NVTE_BUILD_USE_NVIDIA_WHEELS")}
    command = ["bash", "tools/setup.sh", "gpu"]
    done = subprocess.run(command, cwd=node, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    calls = (node / "pip.log").read_text().splitlines()
    (build,) = [i for i, line in enumerate(calls) if "transformer-engine-torch==" in line]
    arguments, _, environment = calls[build].partition(" | ")
    first, wheels, jobs = environment.split()
    assert "--no-build-isolation" in arguments and wheels == "1" and int(jobs) >= 1
    assert first == f"{node}/.venv/bin", "ninja lies there"
    assert any("-r /dev/fd/" in line for line in calls[:build]), "torch and the headers are there before"
