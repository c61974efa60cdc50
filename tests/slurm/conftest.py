"""Fixtures: a run folder with a tiny stage's configuration."""

from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from slurm.roles import Programs
from slurm.run_folder import RunFolder
from tests.slurm.support import tiny_config, write_config

TINY = Programs(trainer="tests.slurm.tiny_stage", rollout="tests.slurm.tiny_rollout")


@pytest.fixture
def tiny_run(tmp_path: Path) -> tuple[RunFolder, Config]:
    config = tiny_config(tmp_path / "run")
    return write_config(config), config
