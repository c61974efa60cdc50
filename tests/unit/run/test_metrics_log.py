"""The metrics log across kills and resumes, and what reaches Weights & Biases."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.metrics_log import WANDB_ID_NAME, MetricsLog, read_metrics


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.run.dir, config.model.hf = str(tmp_path / "run"), "models/x"
    return config


def fill(folder: Path, config: Config, first: int, last: int, resume: int = 0) -> None:
    with MetricsLog(folder, config, "sft", resume_iteration=resume, total_iterations=9) as log:
        for iteration in range(first, last + 1):
            log.log(iteration, {"sft/loss": 1.0 / iteration})


def test_a_record_per_iteration(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config, 1, 3)
    records = read_metrics(tmp_path)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert records[1]["sft/loss"] == 0.5 and records[1]["total_iterations"] == 9
    assert records[0]["timestamp"] <= records[2]["timestamp"]


def test_a_resume_logs_nothing_twice(tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, config, 1, 5)
    fill(tmp_path, config, 4, 6, resume=3)
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "dropped 2 of 5 lines, resuming at iteration 3" in capsys.readouterr().out
    fill(tmp_path, config, 1, 1)  # from the start again
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("tail", ['{"iteration": 4, "sft/lo', '{"iteration": 4}', "\x00\x00", "{}\n", "3\n"])
def test_a_torn_last_line_is_mended(tmp_path: Path, config: Config, tail: str) -> None:
    fill(tmp_path, config, 1, 3)
    with StageFolder(tmp_path).metrics.open("a") as file:
        file.write(tail)
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    fill(tmp_path, config, 4, 4, resume=3)
    lines = StageFolder(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]


def test_what_is_not_finite_stays_readable_json(tmp_path: Path, config: Config) -> None:
    with MetricsLog(tmp_path, config, "sft") as log:
        log.log(1, {"a": float("nan"), "b": float("-inf"), "c": 2})
    assert "NaN" not in StageFolder(tmp_path).metrics.read_text()
    record = read_metrics(tmp_path)[0]
    assert (record["a"], record["b"], record["c"]) == ("nan", "-inf", 2)


def test_a_killed_process_loses_no_record(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from megatron_vcppo.config import Config\nfrom megatron_vcppo.run.metrics_log import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), Config(), 'sft')\n"
        "[log.log(i, {'x': i}) for i in range(1, 51)]\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert [record["x"] for record in read_metrics(tmp_path)] == list(range(1, 51))


def test_online_without_a_key_is_the_users_to_mend(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    config.run.wandb = "online"
    with pytest.raises(UserError, match="no API key"):
        MetricsLog(tmp_path, config, "sft")


def wandb_messages(content: bytes) -> Iterator[bytes]:
    """The file is LevelDB's log: blocks of 32 KiB, in which a message is one piece (type 1), or a first, middle and
    last one (2, 3, 4), each after its checksum, length and type; the first seven bytes are the file's mark."""
    place, message = 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:  # too little for a head: padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def wandb_records(path: Path) -> tuple[set[str], list[int]]:
    """Ids of runs in an offline file, and the steps that it has: what `wandb sync` uploads, files in order of time."""
    ids, steps = set(), []
    for data in wandb_messages(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
    return ids, steps


def test_offline_runs_keep_their_id_and_no_secret(tmp_path: Path, config: Config) -> None:
    config.run.wandb, config.run.wandb_project = "offline", "my-own-project"
    config.cluster.environment["PRIVATE"] = "do-not-publish"
    config.run.notify = "true do-not-publish"
    config.cluster.setup, config.cluster.sbatch = ["true do-not-publish"], {"comment": "do-not-publish"}
    config.cluster.srun = {"network": "do-not-publish"}
    config.overrides = {"sft": {"cluster": {"sbatch": {"comment": "do-not-publish"}, "trainer_nodes": 1}}}
    fill(tmp_path, config, 1, 2)
    identifier = (tmp_path / WANDB_ID_NAME).read_text()
    fill(tmp_path, config, 3, 3, resume=2)
    assert (tmp_path / WANDB_ID_NAME).read_text() == identifier
    stored = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    assert len(stored) == 2
    assert [wandb_records(path) for path in stored] == [({identifier}, [1, 2]), ({identifier}, [3])]
    assert b"sft/loss" in stored[0].read_bytes() and b"my-own-project" in stored[0].read_bytes()
    for folder, _, files in os.walk(tmp_path):
        for name in files:
            assert b"do-not-publish" not in (Path(folder) / name).read_bytes(), name
