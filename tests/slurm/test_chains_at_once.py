"""Several chains at once: who waits for whom, whose CPUs, one failure at a time, requests to stop."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_vcppo.commands.experiment import Chain, check_at_once
from megatron_vcppo.config.load import load_config
from megatron_vcppo.errors import SAVED, UserError
from megatron_vcppo.launch.chains_at_once import INTERRUPTED, ChainCommand, run_at_once, shares_of
from megatron_vcppo.run.folder import RunFolder
from tools.benchmarks._tiny_chains import processes_with, wait_until

CPUS = sorted(os.sched_getaffinity(0))
needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU")


def chain(name: str, folder: Path, code: str, base: str | None = None) -> ChainCommand:
    """A chain that is a line of Python; it leaves a file of its name first."""
    text = f"import os, pathlib, signal, sys, time; pathlib.Path({str(folder / name)!r}).touch(); {code}"
    before = folder / f"run_{base}" if base else None
    return ChainCommand(name, folder / f"run_{name}", (sys.executable, "-c", text), before)


def wait_for(file: Path) -> str:
    """A line that ends when another chain has begun."""
    return f"[time.sleep(0.02) for _ in range(1500) if not os.path.exists({str(file)!r})]"


@needs_two_cpus
def test_chains_run_side_by_side_on_cpus_of_their_own(tmp_path: Path, capfd) -> None:
    shares = shares_of(CPUS[:2], 2)
    met = [
        chain(name, tmp_path, f"{wait_for(tmp_path / other)}; print(sorted(os.sched_getaffinity(0)))")
        for name, other in (("one", "two"), ("two", "one"))
    ]
    assert run_at_once(met, shares) == 0
    out = capfd.readouterr().out
    assert f"one | [{CPUS[0]}]" in out and f"two | [{CPUS[1]}]" in out, "each saw the other begin"
    assert sorted(os.sched_getaffinity(0)) == CPUS, "this process keeps its CPUs"


@needs_two_cpus
def test_arms_wait_for_their_shared_stages_and_others_do_not(tmp_path: Path, capfd) -> None:
    chains = [
        chain("shared_0", tmp_path, wait_for(tmp_path / "base_done_before")),
        chain("arm_0", tmp_path, "pass", base="shared_0"),
        chain("shared_1", tmp_path, "sys.exit(3)"),
        chain("arm_1", tmp_path, "pass", base="shared_1"),
        chain("base_done_before", tmp_path, "pass", base="elsewhere"),
    ]
    assert run_at_once(chains, shares_of(CPUS[:2], 2)) == 3
    out = capfd.readouterr().out
    assert "shared_1: left with exit code 3" in out and "arm_1: left out, because its shared stages failed" in out
    assert not (tmp_path / "arm_1").exists() and (tmp_path / "base_done_before").exists()
    begun = [line.split(": starting")[0] for line in out.splitlines() if ": starting" in line]
    assert begun[:2] == ["experiment: shared_0", "experiment: shared_1"] and begun[-1].endswith("arm_0")


def test_nothing_is_left_of_a_chain_whose_guard_is_killed(tmp_path: Path) -> None:
    detached = "import subprocess; subprocess.Popen(['sleep', '7020.5'], start_new_session=True)"
    code = f"{detached}; os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)"
    assert run_at_once([chain("one", tmp_path, code)], [CPUS[:1]]) == 128 + signal.SIGKILL
    assert not processes_with("sleep 7020")


ASKED = """
asked = []
def note(*_):
    asked.append(1)
    pathlib.Path(f"FOLDER/asked_{len(asked)}").touch()
signal.signal(signal.SIGINT, note)
pathlib.Path("FOLDER/asked_0").touch()
for _ in range(1500):
    if len(asked) == COUNT:
        sys.exit(CODE)
    time.sleep(0.02)
"""


@pytest.mark.parametrize(("count", "code"), [(1, SAVED), (2, INTERRUPTED)])
def test_a_request_to_stop_is_passed_on_and_starts_nothing_more(count: int, code: int, tmp_path: Path) -> None:
    script = tmp_path / "chain.py"
    text = ASKED.replace("FOLDER", str(tmp_path)).replace("COUNT", str(count)).replace("CODE", str(code))
    script.write_text(f"import pathlib, signal, sys, time\n{text}")
    chains = [
        ChainCommand("first", tmp_path / "first", (sys.executable, str(script))),
        chain("second", tmp_path, "pass"),
    ]

    def interrupt() -> None:
        for number in range(count):
            wait_until((tmp_path / f"asked_{number}").exists, "the first chain")
            os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=interrupt)
    asking.start()
    assert run_at_once(chains, shares_of(CPUS, 1)) == code
    asking.join()
    assert (tmp_path / f"asked_{count}").exists() and not (tmp_path / "second").exists()


def test_nothing_begins_with_a_chain_that_someone_stopped(tmp_path: Path) -> None:
    chains = [chain("shared", tmp_path, f"sys.exit({SAVED})"), chain("arm", tmp_path, "pass", base="shared")]
    assert run_at_once(chains, shares_of(CPUS, 1)) == SAVED
    assert not (tmp_path / "arm").exists()


def test_a_chain_does_not_wait_for_a_reader_that_is_gone(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.slurm.test_chains_at_once import CPUS, chain, run_at_once, shares_of
printing = "time.sleep(0.5); [print('x' * 1000) for _ in range(500)]; pathlib.Path('{tmp_path}/end').touch()"
run_at_once([chain("one", Path("{tmp_path}"), printing)], shares_of(CPUS, 1))
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert command.stdout is not None
    assert b"starting" in command.stdout.readline()
    command.stdout.close()  # vcppo experiment … | head -1
    command.wait(30)
    assert (tmp_path / "end").exists()


def test_shares_are_neighbors_and_use_every_cpu() -> None:
    assert shares_of([0, 1, 2, 4, 5], 2) == [(0, 1), (2, 4, 5)]
    assert shares_of([3, 7], 2) == [(3,), (7,)]


def test_what_cannot_run_at_once_is_refused(tmp_path: Path) -> None:
    config = load_config("configs/demo/sft.yaml", [])
    with pytest.raises(UserError, match=f"this machine has {len(CPUS)} CPUs"):
        check_at_once(len(CPUS) + 1, [])
    if len(CPUS) > 1:
        config.cluster.name = "somewhere"
        with pytest.raises(UserError, match="leave it out with --cluster"):
            check_at_once(2, [Chain("one", RunFolder(tmp_path), config, ["sft"])])
