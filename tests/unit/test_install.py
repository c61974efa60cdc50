"""The install scripts' mistakes and the locks: what can be tested without installing anything."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/setup.sh", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("tpu",)])
def test_the_kind_must_be_named(arguments: tuple[str, ...]) -> None:
    result = run_setup(*arguments)
    assert result.returncode == 2
    assert result.stderr == "usage: tools/setup.sh cpu|gpu\n"


def test_no_fitting_python_is_said_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("tools/setup.sh", "requirements-cpu.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "flock", "rm", "sha256sum"):
        path = shutil.which(name)
        assert path
        (programs / name).symlink_to(path)
    result = run_setup("cpu", cwd=tmp_path, PATH=str(programs))
    assert result.returncode == 2
    assert result.stderr.startswith("setup: error: no Python 3.11 or 3.12 found")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_locks_are_those_of_the_requirements(kind: str) -> None:
    lock = (ROOT / f"requirements-{kind}.lock").read_text()
    locked = set(re.findall(r"^[\w.-]+==[^ ;\n]+", lock, re.MULTILINE))
    pins = []
    for name in ("requirements.txt", f"requirements-{kind}.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins += [re.sub(r"\[.*?\]|[ ;#].*", "", line).lower() for line in lines if "==" in line]
    assert len(pins) > 15
    assert set(pins) <= locked, f"run tools/lock_requirements.sh: {set(pins) - locked}"


def test_no_file_names_a_package_index() -> None:
    for path in [*ROOT.glob("requirements*"), ROOT / "pyproject.toml"]:
        assert "index" not in path.read_text() and "://" not in path.read_text(), path


def test_slurm_is_installed_under_the_packages_name_alone(tmp_path) -> None:
    """A wheel made of this checkout; a top-level ``slurm`` would shadow whatever else has that name."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=copy_of_the_sources(tmp_path / "sources"), check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "megatron_vcppo/slurm/job.py" in names
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"megatron_vcppo"}


def copy_of_the_sources(folder: Path) -> Path:
    """What a build reads; it writes into its own folder."""
    folder.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "megatron_vcppo", "slurm"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder
