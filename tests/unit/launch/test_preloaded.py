"""Ranks that are forked from a process with their imports: each as if it had been executed, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vcppo.errors import SAVED
from megatron_vcppo.launch import preloaded
from megatron_vcppo.launch.controller import Outcome, RoleProcess, supervise
from megatron_vcppo.launch.preloaded import Preloaded
from megatron_vcppo.run.processes import alive
from tools.benchmarks._tiny_chains import processes_with, wait_until

HEAVY = """
    import os, time
    with open(os.environ["IMPORTS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    print("importing", flush=True)
    time.sleep(float(os.environ.get("IMPORT_S", "0")))
"""


class Ranks:
    """Ranks that run a given code, forked from one process that has imported the module ``heavy``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.preloaded = folder, Preloaded(folder / "preloaded.log", sys.executable, ["heavy"])
        self.env = {"PYTHONPATH": os.pathsep.join([str(folder), os.getcwd()]), "IMPORTS": str(folder / "imports")}
        self.env["PYTHONDONTWRITEBYTECODE"] = "1"  # the modules change within a second
        (folder / "heavy.py").write_text(textwrap.dedent(HEAVY))

    def process(self, code: str, index: int = 0, name: str = "work", **env: str) -> RoleProcess:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(code))
        return RoleProcess(
            role="trainer",
            index=index,
            command=(sys.executable, "-m", name, "--config", str(self.folder)),
            env=self.env | {"RANK": str(index)} | env,
            log=f"trainer_{index}.log",
            end_signal=signal.SIGKILL,
            preloaded=self.preloaded,
        )

    def run(self, *processes: RoleProcess, logs: str = "logs", **requests: Callable[[], bool]) -> Outcome:
        return supervise([*processes], self.folder / logs, **requests)  # type: ignore[arg-type]

    @property
    def importers(self) -> list[int]:
        """Process ids, one for each time that ``heavy`` was imported."""
        return [int(line) for line in (self.folder / "imports").read_text().split()]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    with made.preloaded:
        yield made
    assert not processes_with(str(tmp_path))


def test_ranks_of_all_attempts_share_the_imports_and_nothing_else(ranks: Ranks) -> None:
    code = """
        import os, sys
        names = ("RANK", "MASTER_PORT")
        print(*map(os.environ.get, names), "heavy" in sys.modules, sys.argv[1], os.getsid(0) == os.getppid())
        line = open("/proc/self/cmdline").read().split(chr(0))
        assert line[0] == "RANK=" + os.environ["RANK"] and line[3] == "work", line
        os.environ["RANK"] = "spoilt"
        assert not os.read(0, 1), "an empty input"
    """
    for attempt, place in (("1", {"MASTER_PORT": "4711"}), ("2", {})):
        assert ranks.run(*(ranks.process(code, n, **place) for n in range(2)), logs=attempt).code == 0
    for attempt, port in (("1", "4711"), ("2", "None")):
        for n in range(2):
            log = (ranks.folder / attempt / f"trainer_{n}.log").read_text()
            assert log == f"{n} {port} True --config True\n"
    assert len(ranks.importers) == 1
    assert (ranks.folder / "preloaded.log").read_text() == "importing\n"


def test_another_environment_is_there_before_the_imports(ranks: Ranks) -> None:
    code = "import os\nprint(os.environ.get('OMP_NUM_THREADS'), flush=True)"
    for threads in ("1", "1", "2"):
        assert ranks.run(ranks.process(code, OMP_NUM_THREADS=threads)).code == 0
    assert (ranks.folder / "logs" / "trainer_0.log").read_text() == "1\n1\n2\n"
    first, second = ranks.importers
    assert first != second and not alive(first)


def test_a_rank_that_fails_is_named_with_its_last_lines(ranks: Ranks) -> None:
    waiting = ranks.process("import time\ntime.sleep(60)", name="waits")
    outcome = ranks.run(waiting, ranks.process("raise ValueError('loss is NaN')", 1))
    assert outcome.code == 1 and outcome.cause == "trainer 1 left with exit code 1"
    assert outcome.details[-1] == "ValueError: loss is NaN"


@pytest.mark.parametrize(("argument", "code", "log"), [("75", 75, ""), ("", 0, ""), ("'bad'", 1, "bad\n")])
def test_a_rank_ends_with_its_code_after_threads_and_exit_functions(
    ranks: Ranks, argument: str, code: int, log: str
) -> None:
    work = f"""
        import atexit, threading, time
        atexit.register(print, "bye")
        threading.Thread(target=lambda: (time.sleep(0.2), print("stored", flush=True))).start()
        raise SystemExit({argument})
    """
    assert ranks.run(ranks.process(work)).code == code
    assert (ranks.folder / "logs" / "trainer_0.log").read_text() == f"{log}stored\nbye\n"


def test_what_cannot_be_imported_is_reported_by_the_rank(ranks: Ranks) -> None:
    (ranks.folder / "heavy.py").write_text("raise OSError('libcuda.so: not found')")
    outcome = ranks.run(ranks.process("import heavy"))
    assert outcome.code == 1 and outcome.details[-1] == "OSError: libcuda.so: not found"


@pytest.mark.parametrize("how", ["raise SystemExit('no libcuda')", "os._exit(3)"])
def test_an_import_that_ends_its_process_is_reported(ranks: Ranks, how: str) -> None:
    (ranks.folder / "heavy.py").write_text(f"import os\nprint('loading libcuda', flush=True)\n{how}")
    outcome = ranks.run(ranks.process("import heavy"))
    assert (outcome.code, outcome.details) in [(1, ["loading libcuda", "no libcuda"]), (137, ["loading libcuda"])]


def test_an_import_that_hangs_ends_with_the_place_where_it_was(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloaded, "IMPORT_TIMEOUT_S", 1.0)
    outcome = ranks.run(ranks.process("raise SystemExit(0)", IMPORT_S="120"))
    assert outcome.killed and "heavy.py" in "".join(outcome.details)


def test_nothing_is_left_of_a_rank_that_is_given_up_before_it_reported(ranks: Ranks) -> None:
    code = """
        import os, subprocess, sys, time
        child = subprocess.Popen(["sleep", "7104.5"], start_new_session=True)
        open(os.path.join(sys.argv[2], "pid"), "w").write(str(child.pid))
        time.sleep(60)
    """
    process, pid = ranks.process(code), ranks.folder / "pid"
    forked = ranks.preloaded.fork(process.command, process.whole_environment(), ranks.folder / "log")
    wait_until(lambda: pid.exists() and pid.read_text(), "its child")
    forked.connection.close()
    wait_until(lambda: not alive(int(pid.read_text())), "its guard to clean up", 10)


def test_a_killed_rank_is_told_from_one_that_failed(ranks: Ranks) -> None:
    outcome = ranks.run(ranks.process("import os\nos.kill(os.getpid(), 9)"))
    assert outcome.code == 137 and outcome.cause == "trainer 0 was killed by SIGKILL" and outcome.killed


def test_ranks_die_with_what_they_were_forked_from_and_the_next_attempt_has_another(ranks: Ranks) -> None:
    kill_it = f"import os\nos.kill(int(open({str(ranks.folder / 'imports')!r}).read()), 9)\nimport time\ntime.sleep(60)"
    outcome = ranks.run(ranks.process(kill_it))
    assert outcome.code == 137 and outcome.killed
    assert ranks.run(ranks.process("pass")).code == 0
    assert len(ranks.importers) == 2


def test_a_request_to_save_or_to_end_reaches_ranks_that_are_still_to_be_forked(ranks: Ranks) -> None:
    process = ranks.process("import time\ntime.sleep(60)", IMPORT_S="1")
    assert ranks.run(process, save_requested=lambda: True).code == SAVED
    process = ranks.process("import time\ntime.sleep(60)", IMPORT_S="60")
    assert ranks.run(process, abort_requested=lambda: True).code == 130


def test_detached_grandchildren_die_with_their_rank(ranks: Ranks) -> None:
    code = f"""
        import subprocess
        child = subprocess.Popen(["sleep", "7102.5"], start_new_session=True)
        open({str(ranks.folder / "pid")!r}, "w").write(str(child.pid))
    """
    assert ranks.run(ranks.process(code)).code == 0
    assert not alive(int((ranks.folder / "pid").read_text()))


def test_nothing_is_left_of_a_killed_controller(ranks: Ranks) -> None:
    code = f"""
        from pathlib import Path
        from tests.unit.launch.test_preloaded import Ranks
        ranks = Ranks(Path({str(ranks.folder)!r}))
        ranks.run(*(ranks.process("import time; time.sleep(600)", n) for n in range(2)))
    """
    controller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    folder = str(ranks.folder)
    wait_until(lambda: [line for line in processes_with(f"-m work --config {folder}") if "RANK=1" in line], "ranks")
    controller.kill()
    controller.wait()
    wait_until(lambda: not processes_with(folder), "guards to clean up", 10)
