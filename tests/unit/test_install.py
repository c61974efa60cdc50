"""Setup scripts, locks, package metadata and commit hooks: what can be tested without installing anything."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from megatron_vcppo import __version__
from megatron_vcppo.launch.snapshot import sources, take_snapshot
from megatron_vcppo.run.folder import RunFolder
from tests.helpers.source import ROOT, imports

PACKAGE_OF = {"antlr4": "antlr4-python3-runtime", "megatron": "megatron-core", "triton": "torch", "yaml": "pyyaml"}
"""Import name → what installs it, where the names differ or the package always brings it."""


def run_setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/setup.sh", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("tpu",), ("cpu", "3.10")])
def test_kind_and_version_are_checked(arguments: tuple[str, ...]) -> None:
    result = run_setup(*arguments)
    assert result.returncode == 2
    assert result.stderr == "usage: tools/setup.sh cpu|gpu [3.11|3.12]\n"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What tools/setup.sh reads before it installs anything, and ``bin``: the programs that it runs, but no Python."""
    for name in ("tools/setup.sh", "requirements-cpu.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "flock", "rm", "sha256sum"):
        path = shutil.which(name)
        assert path
        (programs / name).symlink_to(path)
    return tmp_path


def setup_without_python(bare: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_setup(*arguments, cwd=bare, PATH=str(bare / "bin"), HOME=str(bare), PYENV_ROOT="", PYTHON="")


def test_no_fitting_python_is_reported_before_anything_is_made(bare: Path) -> None:
    result = setup_without_python(bare, "cpu")
    assert result.returncode == 2
    assert result.stderr.startswith("setup: error: no Python 3.11 or 3.12 found")
    assert not (bare / ".venv").exists()


def test_a_version_that_is_missing_has_an_exit_code_of_its_own(bare: Path) -> None:
    """tools/test.sh then reports that nothing ran on it. pyenv's command of that name is there, but not activated."""
    for version, name in (("3.11", "python3.11"), ("3.10", "python3.12")):
        program = bare / "bin" / name
        program.write_text(f'#!/bin/bash\n[ "{version}" = "$3" ]\n')
        program.chmod(0o755)
    result = setup_without_python(bare, "cpu", "3.12")
    assert result.returncode == 3
    assert result.stderr.startswith("setup: no Python 3.12 found; install it or set PYTHON=")
    assert not (bare / ".venv-3.12").exists()


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


def test_no_pin_names_a_package_index() -> None:
    """Where packages come from is the installer's configuration: a mirror must be able to serve them all."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = {path.name: path.read_text() for path in ROOT.glob("requirements*")}
    pins["pyproject.toml"] = "\n".join(metadata["build-system"]["requires"])
    assert len(pins) >= 6
    for name, text in pins.items():
        assert "://" not in text and not re.search(r"^\s*(-i|-f|--(extra-)?index|--find-links)", text, re.MULTILINE), (
            name
        )
    assert not metadata["tool"].keys() & {"uv", "pip", "poetry", "pdm"}, "their sections can name an index"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2503.01491"}]


def test_commit_hooks_are_steps_of_the_tests_without_network() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    steps = re.findall(r"^step \w+ (.+)$", (ROOT / "tools" / "test.sh").read_text(), re.MULTILINE)
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        command = hook["entry"].removeprefix(".venv/bin/")
        assert command != hook["entry"] and {command, f"{command} ."} & set(steps), hook["entry"]


@pytest.mark.parametrize(
    ("setup", "arguments", "code", "expected"),
    [
        (0, (), 0, "tests, Python 3.12   passed"),
        (3, (), 0, "not run: Python 3.12 (no such interpreter on this machine)"),
        (1, (), 0, "not run: Python 3.12 (its environment could not be made, see above)"),
        (0, ("tests/unit",), 0, "not run: Python 3.12 (only without arguments)"),
    ],
)
def test_the_summary_tells_what_ran_on_the_other_version(
    tmp_path: Path, setup: int, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    """tools/test.sh around programs that do nothing; setup: exit code of tools/setup.sh for that version."""
    programs = {
        "tools/setup.sh": f'[ -z "${{2:-}}" ] || exit {setup}',
        "tools/install_slurm.sh": "exit 3",
        "tools/install_te.sh": "",
        ".venv/bin/python": "echo 3.11",
        ".venv-3.12/bin/pytest": "echo suite: $*",
        **{f".venv/bin/{name}": "" for name in ("ruff", "mypy", "pytest")},
    }
    for name, body in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "tools" / "test.sh", tmp_path / "tools")
    command = ["bash", "tools/test.sh", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    output, _, summary = result.stdout.partition("== summary\n")
    assert "tests, Python 3.11   passed" in summary and "skipped: tests on a real Slurm" in summary
    assert summary.count("Python 3.12") == 1 and expected in summary, summary
    assert ("suite: tests/unit tests/distributed/" in output) == expected.endswith("passed")


def test_the_other_versions_suite_exists() -> None:
    """Each entry is a folder, or a test that the default markers select."""
    (block,) = re.findall(
        r"^other_suite=\((.*?)^\)", (ROOT / "tools" / "test.sh").read_text(), re.MULTILINE | re.DOTALL
    )
    for entry in block.split():
        path, _, test = entry.strip('"').partition("::")
        assert (ROOT / path).exists()
        assert not test or re.search(
            rf"(?<!pytest\.mark\.slow\n)^def {test}\(", (ROOT / path).read_text(), re.MULTILINE
        )


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
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    declared |= {re.split(r"[^\w.-]", need.lower())[0] for needs in extras.values() for need in needs}
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
