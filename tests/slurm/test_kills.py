"""The series of random kills (tools/bench.py kills): what it looks at, and a short one."""

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tools import bench
from tools.benchmarks._tiny_chains import wait_until
from tools.benchmarks.kills import MARK, Chain, Local, is_of_role


def test_a_chains_processes_are_found_also_those_that_hide_from_it(tmp_path: Path) -> None:
    """A verifier has a clean environment and a session of its own; its parent's end does not lose it."""
    chain = Chain(tmp_path / "run", 1, Local(), random.Random(1))
    shell = "env -i setsid sleep 3600.987 & sleep 3600.986; wait"
    parent = subprocess.Popen(["sh", "-c", shell], env=os.environ | {MARK: str(chain.folder)})
    other = subprocess.Popen(["sleep", "60"])
    try:
        both = ["sleep 3600.986", "sleep 3600.987"]
        wait_until(lambda: sorted(chain.processes().values())[-2:] == both, "both")
        found = chain.processes()
        assert parent.pid in found and other.pid not in found
        assert chain.victim("engine") in found and chain.victim("supervisor") is None
        parent.kill()
        parent.wait()
        left = chain.processes()
        assert sorted(left.values()) == both
    finally:
        other.kill()
        other.wait()
        for pid in chain.processes():
            os.kill(pid, signal.SIGKILL)


def test_a_guard_is_no_rank_and_srun_has_no_role() -> None:
    rank = "python -m tools.benchmarks._tiny_stage sft --config x"
    assert is_of_role("rank", os.getpid(), rank) and not is_of_role("supervisor", os.getpid(), rank)
    for before in ("/usr/bin/srun --overlap", "python -I -S /x/guard.py", "sh -c"):
        assert not is_of_role("rank", os.getpid(), f"{before} {rank}")
    assert is_of_role("guard", os.getpid(), f"python -I -S /x/guard.py {rank}") and not is_of_role("guard", 1, rank)
    forked_from = "python -m megatron_vcppo.launch.preloaded --log x tools.benchmarks._tiny_stage.sft"
    assert is_of_role("preloaded", os.getpid(), forked_from) and not is_of_role("rank", os.getpid(), forked_from)
    assert is_of_role("writer", os.getpid(), f"RANK=0 {rank}") and not is_of_role(
        "writer", os.getpid(), f"RANK=1 {rank}"
    )
    assert is_of_role("controller", os.getpid(), "python -u -m submitit.core._submit /x/slurm")


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_chain_survives_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kills", "--count", "4", "--minutes", "5", "--places", "local", "--folder", str(tmp_path)]
    bench.main(words)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    summary = rows[-1]
    assert summary["kills"] == 4 and summary["chains"] == summary["chains_good"] >= 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    bench.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary, "nothing is left to do"
