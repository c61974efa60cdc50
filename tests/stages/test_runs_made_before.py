"""A run folder that an earlier release wrote is read, reported, exported and resumed as if nothing had changed."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT / "tests" / "fixtures" / "run_of_release_1.tar.zst"
CLOCK = ("time/", "stopping/", "speed/", "timestamp", "weight_sync/pause_s")


@pytest.fixture
def old(tmp_path) -> Path:
    """The folder with ``run`` and ``task``."""
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(ARCHIVE.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)  # our own; filters came with Python 3.11.4
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("@ROOT@", str(tmp_path)))
    return tmp_path


def vcppo(folder: Path, *arguments: str, timeout_s: float = 100) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vcppo.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_read_reported_and_exported(old) -> None:
    assert "ppo" in vcppo(old, "status", "run")
    assert "iteration" in vcppo(old, "rollouts", "run", "--iteration", "3")
    vcppo(old, "report", "run")
    checkpoint = old / "run" / "ppo" / "checkpoints" / "iter_0000002" / "actor"
    vcppo(old, "convert", "export", "--checkpoint", str(checkpoint), "--out", str(old / "hf"))
    assert (old / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_it_resumes_with_the_numbers_that_it_would_have_had(old) -> None:
    stored = old / "run" / "ppo" / "rollouts" / "iter_0000003_0of1.jsonl.zst"
    before = stored.stat().st_mtime_ns
    vcppo(old, "resume", "run", "--until", "export", timeout_s=280)
    assert stored.stat().st_mtime_ns == before, "the rollouts that were stored are trained on, not made again"
    assert (old / "run" / "export" / "manifest.json").exists()
    same_numbers(records(old / "run" / "ppo" / "metrics.jsonl"), records(old / "expected_ppo_metrics.jsonl"))


def same_numbers(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Everything but seconds, to the last bits that a sum in another order may change."""
    assert [record["iteration"] for record in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found, expected, strict=True):
        names = [name for name in theirs if not name.startswith(CLOCK)]
        assert set(names) <= set(ours)
        for name in names:
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-6, abs_tol=1e-9), (ours["iteration"], name)
