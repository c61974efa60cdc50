"""What TensorBoard shows of a stage, across a kill and a resume."""

import sys
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.metrics_log import MetricsLog


def config_of(folder: Path) -> Config:
    config = Config()
    config.run.dir, config.model.hf, config.run.tensorboard = str(folder), "models/x", True
    return config


def test_a_resume_replaces_what_was_logged_beyond_its_checkpoint(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_of(tmp_path)
    with MetricsLog(tmp_path, config, "sft") as log:
        for iteration in range(1, 6):
            log.log(iteration, {"sft/loss": float(iteration), "text": "x", "bad": float("nan")})
    with MetricsLog(tmp_path, config, "sft", resume_iteration=3) as log:
        log.log(4, {"sft/loss": 40.0})
    shown = accumulators.EventAccumulator(str(StageFolder(tmp_path).tensorboard))
    shown.Reload()
    assert shown.Tags()["scalars"] == ["sft/loss"]
    points = [(event.step, event.value) for event in shown.Scalars("sft/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_without_the_package_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"pip install tensorboard, or set run\.tensorboard=false"):
        MetricsLog(tmp_path, config_of(tmp_path), "sft")
