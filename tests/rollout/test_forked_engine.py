"""Engines that are forked from their supervisor: when they are, and that they are as if they had been executed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.launch.local_chain import Preloads, local_processes, prepare_engines
from megatron_vcppo.launch.preloaded import Preloaded
from megatron_vcppo.rollout import engine_command
from megatron_vcppo.rollout.engine_command import CPU_SERVER, SETTABLE, Placement
from megatron_vcppo.rollout.node import share
from megatron_vcppo.rollout.supervisor import kill_group
from megatron_vcppo.run.processes import alive
from tools.benchmarks._tiny_chains import processes_with, tiny_config, wait_until, write_config

COMMAND = (sys.executable, "-m", CPU_SERVER, "--port", "4711")


def of_supervisor(config: Config) -> dict[str, str]:
    """The environment that a chain on this machine gives the supervisor of the engines that are forked from it."""
    preloads = Preloads(rollout=Preloaded(Path("log"), sys.executable, []))
    process = local_processes(write_config(config), config, "evaluate", preloads=preloads)[-1]
    assert process.role == "rollout" and process.preloaded is preloads.rollout
    return process.whole_environment()


def of_engine(config: Config, base: dict[str, str], folder: Path) -> dict[str, str]:
    """Of the first engine."""
    cpus = share(sorted(os.sched_getaffinity(0)), 0, config.rollout.engine.per_node)
    return engine_command.environment(base, config.rollout.engine, Placement(cpus=cpus), folder / "secret", "127.0.0.1")


@pytest.mark.parametrize("per_node", [1, 2, 100])
def test_a_supervisor_has_its_engines_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_node: int
) -> None:
    for name, value in {"MKL_NUM_THREADS": "3", "SLURM_JOB_ID": "1", "OMP_PROC_BIND": "true", "OURS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    config = tiny_config(tmp_path / "run", ("evaluate",))
    config.rollout.engine.per_node, config.rollout.engine.cpu_cache_gib = per_node, 2
    config.cluster.environment = {"THEIRS": "2", "OMP_NUM_THREADS": "7"}
    base = of_supervisor(config)
    engine = of_engine(config, base, tmp_path)
    assert {name for name in base.keys() | engine.keys() if base.get(name) != engine.get(name)} <= SETTABLE
    assert (base["OURS"], base["THEIRS"], base["GLIBC_TUNABLES"].split(":")[0]) == ("1", "2", "glibc.malloc.check=0")
    assert not {"MKL_NUM_THREADS", "SLURM_JOB_ID", "OMP_PROC_BIND"} & base.keys()

    monkeypatch.setattr(os, "environ", base)
    assert not engine_command.is_preloaded(COMMAND, engine), "nothing is imported"
    monkeypatch.setitem(sys.modules, CPU_SERVER, ModuleType(CPU_SERVER))
    assert engine_command.is_preloaded(COMMAND, engine)
    assert not engine_command.is_preloaded(COMMAND, engine | {"OMP_NUM_THREADS": "99"})
    assert not engine_command.is_preloaded((*COMMAND[:2], "vllm.entrypoints.openai.api_server"), engine)


def test_what_engines_are_forked_from_ends_when_no_stage_needs_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("evaluate", "export"))
    with Preloaded(tmp_path / "log", sys.executable, []) as rollout:
        prepare_engines(config, ["evaluate", "export"], Preloads(rollout=rollout))
        wait_until(lambda: processes_with(f"--log {tmp_path}"), "a process that imports")
        prepare_engines(config, ["export"], Preloads(rollout=rollout))
        assert not processes_with(f"--log {tmp_path}")


def fork(monkeypatch: pytest.MonkeyPatch, log: Path, main: object) -> engine_command.ForkedEngine:
    server = ModuleType(CPU_SERVER)
    server.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, CPU_SERVER, server)
    for number, name in ((1, "stdout"), (2, "stderr")):  # in the place of pytest's
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    with log.open("ab") as output:
        return engine_command.ForkedEngine(COMMAND, {"ONLY": "this"}, output.fileno())


def test_a_forked_engine_has_its_arguments_environment_session_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        print(sys.argv[1:], dict(os.environ), os.getsid(0) == os.getpid(), os.read(0, 1), flush=True)
        os.system("echo $ONLY")
        sys.exit(3)

    engine = fork(monkeypatch, tmp_path / "log", main)
    assert engine.wait(30) == 3 == engine.poll() == engine.returncode
    assert (tmp_path / "log").read_text() == "['--port', '4711'] {'ONLY': 'this'} True b''\nthis\n"


@pytest.mark.parametrize(("argument", "code", "log"), [(None, 0, ""), ("no such option", 1, "no such option\n")])
def test_a_forked_engine_ends_as_an_executed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str | None, code: int, log: str
) -> None:
    assert fork(monkeypatch, tmp_path / "log", lambda: sys.exit(argument)).wait(30) == code
    assert (tmp_path / "log").read_text() == log


def test_a_forked_engine_that_raises_leaves_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ValueError("no such model")

    assert fork(monkeypatch, tmp_path / "log", main).wait(30) == 1
    assert (tmp_path / "log").read_text().endswith("ValueError: no such model\n")


def test_a_forked_engine_ends_with_its_group_and_with_the_thread_that_forked_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        child = subprocess.Popen(["sleep", "7103.5"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(600)

    engine = fork(monkeypatch, tmp_path / "log", main)
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait(0.05)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "its child")
    kill_group(engine, 5.0)
    assert engine.returncode == -signal.SIGTERM and not alive(int((tmp_path / "pid").read_text()))

    def main_of_another() -> None:
        (tmp_path / "begun").touch()
        time.sleep(600)

    engines: list[engine_command.ForkedEngine] = []

    def start_another() -> None:
        engines.append(fork(monkeypatch, tmp_path / "log", main_of_another))
        wait_until((tmp_path / "begun").exists, "another engine")

    thread = threading.Thread(target=start_another)
    thread.start()
    thread.join()
    assert engines[0].wait(30) == -signal.SIGKILL
