"""A full disk, at every kind of write: one line that names the file, and nothing half-written under its final name.

A limit on the size of files stands in for it: what exceeds it is refused in the middle of a write.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from tests.helpers.recipes import write_sft_recipe
from tools.benchmarks._tiny_chains import tiny_config, write_config
from tools.benchmarks._tiny_models import save_tiny_model

LIMITED = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from megatron_vcppo.cli import main
from megatron_vcppo.errors import system_error
"""
WRITES = {
    "stored rollouts": """
import numpy as np
from tests.unit.run.test_rollout_store import make_rollout
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.run.rollout_store import write_rollouts
rollouts = [make_rollout(i) for i in range(3000)]
work = lambda: write_rollouts(Path("out"), 1, RolloutPart.whole(rollouts))
""",
    "tensorboard": """
from megatron_vcppo.run.tensorboard_log import TensorBoardLog
log = TensorBoardLog(Path("out"), 0)
work = lambda: [log.log(i, {f"metric_{n}": 1.0 for n in range(100)}) for i in range(9)]
""",
    "data cache": """
import numpy as np
from megatron_vcppo.data import sft_dataset
from megatron_vcppo.run.files import replacing
def work():
    with replacing(Path("out/cache")) as folder:
        folder.mkdir()
        sft_dataset._write_array(folder / "tokens.npy", np.arange(100_000))
""",
}
"""What ranks write; their process says the line of ``system_error``."""


def limited(program: str, folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LIMITED + program, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize("what", WRITES)
def test_what_a_rank_writes(what: str, tmp_path: Path) -> None:
    if what == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / "out").mkdir()
    program = WRITES[what] + "limit()\ntry: work()\nexcept OSError as error: print(system_error(error)); sys.exit(2)\n"
    found = limited(program, tmp_path)
    assert found.returncode == 2, found.stderr
    assert re.fullmatch(r"out\S*: File too large: make room.*, then run the same command again\n", found.stdout)
    if what != "tensorboard":  # a log, which has the records before
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", ["dry run", "report", "convert", "export"])
def test_what_a_command_writes(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "report":
        run = write_config(tiny_config(tmp_path / "run"))
        call, made = ["report", run.path], tmp_path / "run" / "report.html"
    elif command in ("convert", "export"):
        made, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
        call = ["convert", "import", "--hf", save_tiny_model(tmp_path / "hf"), "--out", made]
        if command == "export":
            assert main([*map(str, call[:-1]), str(checkpoint)]) == 0
            call = ["convert", "export", "--checkpoint", checkpoint, "--out", made, "--no-verify"]
    else:
        call, made = ["submit", write_sft_recipe(tmp_path), "--dry-run"], tmp_path / "run"
    found = limited("limit(); sys.exit(main(sys.argv[1:]))", tmp_path, *call)
    assert found.returncode == 2, found.stderr
    line = found.stderr.splitlines()[-1]
    assert line.startswith(f"vcppo: error: {tmp_path}/") and "run" in line and "File too large: make room" in line, line
    assert not made.exists() and not [*tmp_path.rglob("*.tmp"), *tmp_path.glob(".*")]
    assert main([str(part) for part in call]) == 0, "with room"
