"""A home directory that cannot be written, as on some compute nodes: what needs it, and what does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOADS = "from megatron_vcppo.data.hub import open_hub_dataset; print(open_hub_dataset({folder!r}, 'train')[0])"
LOGS = """
import os
from pathlib import Path
from megatron_vcppo.config import Config
from megatron_vcppo.config.network import node_environment
from megatron_vcppo.run.metrics_log import MetricsLog
config = Config()
config.run.dir, config.run.wandb, config.run.tensorboard = {folder!r}, "offline", True
os.environ.update(node_environment(config.cluster))
with MetricsLog(Path({folder!r}) / "sft", config, "sft") as log:
    log.log(1, {{"loss": 1.5}})
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Neither this user nor, without its rights, root may write it."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o555)
    return folder


def python(home: Path, code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    drop = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    prefix = ["setpriv", drop] if os.getuid() == 0 else []
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "WANDB_"))}
    env = known | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "TMPDIR": str(home.parent)} | variables
    return subprocess.run([*prefix, sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_a_cache_of_data_sets_that_cannot_be_written_is_named_with_what_to_set(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "1+1"}\n')
    refused = python(home, LOADS.format(folder=str(data)))
    assert refused.returncode and refused.stderr.splitlines()[-1].endswith(
        "Permission denied: set HF_HOME to a folder that can be written"
    ), refused.stderr
    given = python(home, LOADS.format(folder=str(data)), HF_HOME=str(tmp_path / "hf"))
    assert given.stdout == "{'prompt': '1+1'}\n", given.stderr


def test_weights_and_biases_offline_and_tensorboard_need_no_home(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    logged = python(home, LOGS.format(folder=str(tmp_path / "run")))
    assert logged.returncode == 0 and "ERROR" not in logged.stderr, logged.stderr
    assert list((tmp_path / "run" / "sft").glob("wandb/offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "sft" / "tensorboard").iterdir()) and not list(home.iterdir())
