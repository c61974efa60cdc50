"""What the check at the end of every test session finds, and that a hung rank's children end with it."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_vcppo.run.processes import alive
from tests.helpers.distributed import RanksFailed, run_distributed_test

SESSION = """
    import subprocess

    def test_that_leaves_a_grandchild():
        subprocess.run(["sh", "-c", "sleep 987 >/dev/null 2>&1 &"], check=True)
"""


def test_a_process_that_outlives_its_parent_fails_the_session(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests import conftest\nconftest.ENDING_S = 0.2\nnothing_left = conftest.nothing_left\n"
    )
    (tmp_path / "test_it.py").write_text(textwrap.dedent(SESSION))
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3])
    assert done.returncode == 1 and "1 passed, 1 error" in done.stdout, done.stdout
    assert "tests left processes: " in done.stdout and "sleep 987" in done.stdout


def _hang(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "986"], start_new_session=True)
    (folder / f"{os.environ['RANK']}.pid").write_text(str(child.pid))
    time.sleep(600)


def test_a_hung_ranks_children_end_with_it(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed):
        run_distributed_test(_hang, 2, tmp_path, timeout_s=1)
    children = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(children) == 2 and not any(alive(pid) for pid in children)
