"""The container recipes: both make one environment, from files that are there, with the CUDA of the lock."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "tools" / "containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()
DEFINITION = (CONTAINERS / "megatron_vcppo.def").read_text()


def section(name: str) -> list[str]:
    """Lines of a section of the Apptainer definition."""
    match = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.MULTILINE | re.DOTALL)
    assert match, f"no section %{name}"
    return [line.strip() for line in match[1].splitlines() if line.strip()]


def copied_by_docker() -> dict[str, str]:
    """Source -> place in the image."""
    (home,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    places: dict[str, str] = {}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        places |= {source: f"{home}/{source if target == './' else target}" for source in sources}
    return places


def test_both_recipes_copy_the_same_files_and_all_that_the_set_up_reads() -> None:
    copied = copied_by_docker()
    assert dict(line.split() for line in section("files")) == copied
    assert all((ROOT / name).exists() for name in copied)
    script = (ROOT / "tools" / "setup.sh").read_text() + (ROOT / "pyproject.toml").read_text()
    read = {"pyproject.toml", "requirements-gpu.lock", "requirements.txt", "README.md", "LICENSE", "tools"}
    assert read <= set(copied) and {"pyproject.toml", "README.md", "LICENSE", "requirements.txt"} <= {
        name for name in copied if name in script
    }
    packages = re.search(r"^include = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages and {name.strip('"* ') for name in packages[1].split(",")} <= set(copied)


def test_both_recipes_start_from_the_cuda_of_the_lock() -> None:
    (docker,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    (apptainer,) = re.findall(r"^From: (\S+)$", DEFINITION, re.MULTILINE)
    assert docker == apptainer
    lock = (ROOT / "requirements-gpu.lock").read_text()
    (version,) = set(re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", lock, re.MULTILINE))
    assert docker.startswith(f"nvidia/cuda:{version}.") and docker.endswith("-ubuntu24.04")


def test_both_recipes_run_the_set_up_and_start_vcppo() -> None:
    home = copied_by_docker()["tools"].removesuffix("/tools")
    assert "RUN tools/containers/install.sh" in DOCKERFILE.splitlines()
    assert section("post") == [f"{home}/tools/containers/install.sh"]
    assert "tools/setup.sh gpu" in (CONTAINERS / "install.sh").read_text()
    assert section("environment") == [f"export PATH={home}/.venv/bin:$PATH"]
    assert f"ENV PATH={home}/.venv/bin:$PATH" in DOCKERFILE and 'ENTRYPOINT ["vcppo"]' in DOCKERFILE
    assert section("runscript") == ['exec vcppo "$@"']


def test_the_profile_names_the_image_s_interpreter() -> None:
    profile = yaml.safe_load((ROOT / "configs" / "cluster" / "example-container.yaml").read_text())["cluster"]
    home = copied_by_docker()["tools"].removesuffix("/tools")
    assert profile["container_python"] == f"{home}/.venv/bin/python"
    assert profile["container_image"] in (CONTAINERS / "README.md").read_text()


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("hadolint", [CONTAINERS / "Dockerfile"]),
        (
            "shellcheck",
            [
                *sorted(ROOT.glob("tools/*.sh")),
                *sorted(ROOT.glob("examples/*/*.sh")),
                *sorted(CONTAINERS.glob("*.sh")),
                ROOT / ".ci" / "run",
            ],
        ),
    ],
)
def test_linters_have_nothing_to_say(tool: str, files: list[Path]) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed; tools/setup.sh installs it")
    done = subprocess.run([tool, *map(str, files)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
