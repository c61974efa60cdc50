"""The direction of imports that docs/architecture.md draws, read from the source of every module."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.source import ROOT, imports, modules, part_of

BASE = {"config", "records", "errors", "integers"}
PURE = BASE | {"algo", "run"}
FEEDS = {"tasks", "rewards", "data", "report"}
MODELS = PURE | FEEDS | {"hf"}
STAGES = MODELS | {"mcore", "rollout", "weight_sync", "stages"}
MAY_IMPORT = {
    "errors": set(),
    "integers": set(),
    "records": {"errors"},
    "config": BASE,
    "run": BASE,
    "algo": BASE,
    **dict.fromkeys(FEEDS, PURE | FEEDS),
    "hf": PURE | FEEDS,
    "mcore": MODELS,
    "rollout": MODELS,
    "weight_sync": MODELS | {"mcore", "rollout"},
    "stages": STAGES,
    "launch": PURE | FEEDS | {"hf"},
    "slurm": PURE | FEEDS | {"hf", "rollout", "launch"},
    "commands": STAGES | {"launch", "slurm"},
    "cli": BASE | {"run"},
}
"""Part of the package → the other parts that it may import; its own is always allowed."""
ONLY_IN = {
    "megatron": "megatron_vcppo/mcore",
    "vllm": "megatron_vcppo/rollout",
    "submitit": "megatron_vcppo/slurm",
    "reasoning_gym": "megatron_vcppo/tasks",
}
"""Library → the only folder whose modules import it."""


def test_every_part_is_in_the_picture() -> None:
    parts = {part_of(path) for path in modules("megatron_vcppo")} - {"__init__"}
    assert parts <= set(MAY_IMPORT), f"not in the picture: {parts - set(MAY_IMPORT)}"


@pytest.mark.parametrize("path", modules("megatron_vcppo"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_one_way(path: Path) -> None:
    allowed = MAY_IMPORT.get(part_of(path), set()) | {part_of(path), "__version__"}
    for name, line in imports(path):
        head, *rest = name.split(".")
        assert head not in ("tools", "tests"), f"{path}:{line}: {name} stands above the package"
        if head == "megatron_vcppo" and rest:
            assert rest[0] in allowed, f"{path}:{line}: {part_of(path)} must not import {name}"


@pytest.mark.parametrize(("library", "folder"), ONLY_IN.items())
def test_a_heavy_library_has_one_importer(library: str, folder: str) -> None:
    for path in [*modules("megatron_vcppo"), *modules("tools")]:
        if path.is_relative_to(ROOT / folder):
            continue
        for name, line in imports(path):
            assert name.split(".")[0] != library, f"{path}:{line}: {name} may be imported only in {folder}/"


def test_algo_is_pure() -> None:
    for path in modules("megatron_vcppo/algo"):
        for name, line in imports(path):
            assert not name.startswith("torch.distributed"), f"{path}:{line}: {name}"


def test_configuration_and_command_line_load_without_torch() -> None:
    code = (
        "import sys, megatron_vcppo.cli, megatron_vcppo.records\n"
        "from megatron_vcppo.config.load import load_config\n"
        "load_config('configs/demo/sft.yaml', ['sft.steps=7', 'sft.schedule.warmup_steps=1'])\n"
        "assert megatron_vcppo.cli.main(['config', 'configs/demo/sft.yaml']) == 0\n"
        "heavy = {'torch', 'numpy', 'megatron', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_a_rank_listens_and_sets_its_environment_before_torch_is_there(tmp_path: Path) -> None:
    """NCCL and gloo read the environment when they load; a stop may come while libraries are imported."""
    code = (
        "import importlib, sys\nfrom pathlib import Path\n"
        "from megatron_vcppo.config.load import load_config\n"
        "from megatron_vcppo.run.config_file import write_config\n"
        "from megatron_vcppo.run.folder import RunFolder\n"
        "from megatron_vcppo.stages.__main__ import main\n"
        f"run = RunFolder(Path({str(tmp_path)!r}))\n"
        "config = load_config('configs/demo/sft.yaml', [f'run.dir={run.path}'])\n"
        "write_config(run, config)\n"
        "def stage(name):\n"
        "    heavy = {'torch', 'megatron', 'vllm', 'transformers'} & set(sys.modules)\n"
        "    sys.exit(f'imported before {name}: {heavy}' if heavy else 42)\n"
        "importlib.import_module = stage\n"
        "sys.argv = ['stage', 'sft', '--config', str(run.config)]\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert result.returncode == 42, result.stderr
