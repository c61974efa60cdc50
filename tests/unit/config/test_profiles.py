"""The cluster profiles that come with the project."""

import pytest

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.value_sources import CONFIGS, profile_files
from megatron_vcppo.errors import UserError


def test_every_shipped_profile_loads() -> None:
    files = sorted((CONFIGS / "cluster").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_config(file, complete=False).cluster.name == file.stem
    with pytest.raises(UserError, match="--cluster nowhere: no such profile; there are: local, devcluster"):
        profile_files("nowhere")
