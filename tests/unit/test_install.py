"""The install scripts' mistakes and the locks: what can be tested without installing anything."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_vcppo.launch.snapshot import sources, take_snapshot
from megatron_vcppo.run.folder import RunFolder
from tests.unit.test_imports import imports

ROOT = Path(__file__).parents[2]
PACKAGE_OF = {"antlr4": "antlr4-python3-runtime", "megatron": "megatron-core", "triton": "torch", "yaml": "pyyaml"}
"""Import name → what installs it, where the names differ or the package always brings it."""


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


def test_a_wheel_holds_the_package_with_its_data_under_one_name(tmp_path) -> None:
    """A wheel made of this checkout; a top-level ``slurm`` would shadow whatever else has that name."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=copy_of_the_sources(tmp_path / "sources"), check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "megatron_vcppo/slurm/job.py" in names
    installed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in installed} == {"megatron_vcppo"}
    assert "megatron_vcppo/report/page.html.jinja" in installed and "megatron_vcppo/report/page.css" in installed
    assert installed == set(sources())  # a run's snapshot of the code holds the same files


def test_every_library_that_the_package_imports_is_declared() -> None:
    declared = set()
    for name in ("requirements.txt", "requirements-cpu.txt", "requirements-gpu.txt"):
        declared |= set(re.findall(r"^([\w.-]+)(?:\[.*\])?==", (ROOT / name).read_text().lower(), re.MULTILINE))
    imported: dict[str, str] = {}
    for path in sources().values():
        if path.suffix != ".py":
            continue
        for name, line in imports(path):
            imported[name.split(".")[0]] = f"{path}:{line}"
    ours = {"megatron_vcppo", *sys.stdlib_module_names}
    missing = {
        name: where
        for name, where in imported.items()
        if name not in ours and PACKAGE_OF.get(name, name.replace("_", "-")) not in declared
    }
    assert not missing


def test_the_code_in_a_run_can_write_its_report(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("stages: [sft]\n")
    code = take_snapshot(RunFolder(tmp_path))
    command = [sys.executable, "-m", "megatron_vcppo.cli", "report", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(code)}, check=True, timeout=120)
    assert "not started" in (tmp_path / "report.html").read_text()


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
