"""The controller with real processes: exit codes, restarts, signals, and that nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcppo.errors import SAVED
from megatron_vcppo.launch.controller import Attempt, RoleProcess, ended_tasks, first_death, reported_code, supervise
from megatron_vcppo.launch.role_commands import role_environment
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.processes import alive
from tools.benchmarks._tiny_chains import processes_with, tiny_config, wait_until


def python(role: str, index: int, code: str, **kwargs) -> RoleProcess:
    command = (sys.executable, "-S", "-c", textwrap.dedent(code))
    return RoleProcess(role, index, command, {}, f"{role}_{index}.log", **kwargs)


def sleeper(tag: str, role: str = "trainer", index: int = 1) -> RoleProcess:
    return RoleProcess(role, index, ("sleep", tag), {}, f"{role}_{index}.log", end_signal=signal.SIGKILL)


def test_returns_zero_when_every_rank_is_done(tmp_path: Path) -> None:
    outcome = supervise([python("trainer", n, "print('hello', flush=True)") for n in range(2)], tmp_path)
    assert outcome.code == 0
    assert (tmp_path / "trainer_1.log").read_text() == "hello\n"


@pytest.mark.parametrize("code", [2, 75, 1])
def test_returns_the_trainers_exit_code(tmp_path: Path, code: int) -> None:
    assert supervise([python("trainer", 0, f"raise SystemExit({code})")], tmp_path).code == code


def test_a_port_that_was_taken_meanwhile_is_worth_another_attempt(tmp_path: Path) -> None:
    message = "DistNetworkError: port: 4711, name: EADDRINUSE, message: address already in use"
    outcome = supervise([python("trainer", 0, f"print({message!r}); raise SystemExit(1)")], tmp_path)
    assert outcome.code == 1 and outcome.killed
    assert not supervise([python("trainer", 0, "print('NaN'); raise SystemExit(1)")], tmp_path / "other").killed


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    outcome = supervise([RoleProcess("trainer", 0, ("/no/such/program",), {}, "trainer_0.log")], tmp_path)
    assert outcome.code == 127 and "/no/such/program: No such file" in outcome.details[0]


def test_nothing_is_left_if_a_rank_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "trainer_1.log").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        supervise([sleeper("7000.5", index=0), sleeper("7000.5", index=1)], tmp_path)
    assert not processes_with("sleep 7000.5"), caught  # whose traceback keeps the attempt


def test_one_dead_rank_ends_the_group_and_is_named(tmp_path: Path) -> None:
    dying = python("trainer", 1, "print('loss is NaN'); raise SystemExit(1)")
    outcome = supervise([sleeper("7001.5", index=0), dying], tmp_path)
    assert outcome.code == 1 and outcome.cause == "trainer 1 left with exit code 1"
    assert outcome.details == ["loss is NaN"]
    assert not processes_with("sleep 7001.5")


def test_a_kill_is_named_before_the_errors_that_follow_from_it() -> None:
    processes = [RoleProcess("trainer", n, ("x",), {}, "x") for n in range(3)]
    assert first_death([(processes[0], 1), (processes[2], 137), (processes[1], 75)]) == (processes[2], 137)
    assert first_death([(processes[0], 75), (processes[1], 1)]) == (processes[1], 1)


def test_detached_grandchildren_die_with_their_rank(tmp_path: Path) -> None:
    code = f"""
        import subprocess
        child = subprocess.Popen(["sleep", "7002.5"], start_new_session=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    """
    assert supervise([python("trainer", 0, code)], tmp_path / "logs").code == 0
    assert not alive(int((tmp_path / "pid").read_text()))


def test_nothing_is_left_of_a_killed_guard_and_others_run_on(tmp_path: Path) -> None:
    detaching = RoleProcess(
        "trainer", 0, ("sh", "-c", "setsid sleep 7010.5 & sleep 7010.6 & sleep 7010.7"), {}, "a.log"
    )
    attempt = Attempt([detaching, sleeper("7011.5")], tmp_path, 1.0)
    try:
        sleeping = lambda: [line for line in processes_with("sleep 7010") if line.split()[1] == "sleep"]  # noqa: E731
        wait_until(lambda: len(sleeping()) == 3, "the children", 10)
        wait_until(lambda: len(processes_with("sleep 7011")) == 2, "the other rank", 10)
        killed, other = (one.process for one in attempt.started)
        killed.kill()
        assert killed.poll() == -signal.SIGKILL and not processes_with("sleep 7010")
        assert other.poll() is None and len(processes_with("sleep 7011")) == 2
    finally:
        attempt.stop()


def test_nothing_is_left_when_the_controller_is_killed(tmp_path: Path) -> None:
    code = f"""
        import sys; sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        from megatron_vcppo.launch.controller import RoleProcess, supervise
        detached = "setsid sleep 7003.5 & sleep 7003.6"
        supervise([RoleProcess("trainer", 0, ("sh", "-c", detached), {{}}, "a.log")], Path({str(tmp_path)!r}))
    """
    controller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_until(lambda: len(processes_with("sleep 7003")) >= 3, "the ranks")
    controller.kill()
    controller.wait()
    wait_until(lambda: not processes_with("sleep 7003"), "the guard to clean up", 5)


def test_a_save_request_reaches_every_rank_and_gives_75(tmp_path: Path) -> None:
    code = """
        import signal, sys, time
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
        print("ready", flush=True)
        time.sleep(60)
    """
    ready = threading.Event()

    def watch_logs() -> None:
        wait_until(lambda: all((tmp_path / f"trainer_{n}.log").exists() for n in range(2)), "logs")
        wait_until(lambda: all("ready" in (tmp_path / f"trainer_{n}.log").read_text() for n in range(2)), "ranks")
        ready.set()

    threading.Thread(target=watch_logs, daemon=True).start()
    outcome = supervise([python("trainer", n, code) for n in range(2)], tmp_path, save_requested=ready.is_set)
    assert outcome.code == SAVED


def test_a_rank_interrupted_while_it_starts_counts_as_saved(tmp_path: Path) -> None:
    outcome = supervise([sleeper("7004.5", index=0)], tmp_path, save_requested=lambda: True)
    assert outcome.code == SAVED


def test_a_save_that_never_comes_is_bounded(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    log = tmp_path / "trainer_0.log"
    outcome = supervise(
        [python("trainer", 0, code, end_signal=signal.SIGKILL)],
        tmp_path,
        save_requested=lambda: log.exists() and "up" in log.read_text(),
        save_allowance_s=lambda: 0.5,
    )
    assert outcome.code == 1 and outcome.cause == "the trainer did not save within 0 s"
    assert outcome.leaving_s is not None and outcome.leaving_s >= 0.5


def test_a_rollout_process_that_dies_alone_is_started_again(tmp_path: Path) -> None:
    life = tmp_path / "life"
    rollout = f"""
        import pathlib, sys, time
        path = pathlib.Path({str(life)!r})
        count = int(path.read_text()) + 1 if path.exists() else 1
        path.write_text(str(count))
        sys.exit(1) if count < 2 else time.sleep(60)
    """
    trainer = f"""
        import pathlib, time
        while not pathlib.Path({str(life)!r}).exists() or pathlib.Path({str(life)!r}).read_text() != "2":
            time.sleep(0.05)
    """
    processes = [python("trainer", 0, trainer), python("rollout", 0, rollout, restarts=2)]
    assert supervise(processes, tmp_path / "logs").code == 0


def test_a_rollout_process_that_dies_for_good_ends_the_attempt(tmp_path: Path) -> None:
    processes = [sleeper("7005.5", index=0), python("rollout", 0, "print('no GPU'); raise SystemExit(1)", restarts=0)]
    outcome = supervise(processes, tmp_path)
    assert outcome.killed and "rollout 0 left with exit code 1 after 0 restarts" in outcome.cause
    assert outcome.details == ["no GPU"] and not processes_with("sleep 7005.5")


def test_a_rollout_user_error_is_not_retried(tmp_path: Path) -> None:
    processes = [sleeper("7006.5", index=0), python("rollout", 0, "raise SystemExit(2)", restarts=5)]
    assert supervise(processes, tmp_path).code == 2


def test_rank_zero_is_shown_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supervise([python("trainer", 0, "print('iteration 1')", shown_log="trainer_0.log")], tmp_path)
    assert "iteration 1" in capsys.readouterr().out


def test_events_survive_a_torn_line(tmp_path: Path) -> None:

    events.append(tmp_path, "one", stage="sft")
    with RunFolder(tmp_path).events.open("a") as file:
        file.write('{"time": 1, "ev')
    assert [event["event"] for event in events.read(tmp_path)] == ["one"]
    assert json.loads(RunFolder(tmp_path).events.read_text().splitlines()[0])["stage"] == "sft"


def test_an_empty_variable_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    env = role_environment(tiny_config(tmp_path / "run"), "trainer")
    command = (sys.executable, "-c", "import sys; print(sys.dont_write_bytecode)")
    assert supervise([RoleProcess("trainer", 0, command, env, "trainer_0.log")], tmp_path / "logs").code == 0
    assert (tmp_path / "logs" / "trainer_0.log").read_text() == "False\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("srun: error: n1: task 1: Exited with exit code 2\nsrun: error: n0: task 0: Terminated", 2),
        ("srun: error: n1: tasks 3-5,7: Killed\nsrun: error: n0: task 0: Exited with exit code 1", 137),
        ("srun: error: n1: task 1: Exited with exit code 75\nsrun: error: n0: task 0: Exited with exit code 75", 0),
        ("srun: error: n0: task 0: Exited with exit code 1\nsrun: error: n1: task 1: Killed", 137),
        ("srun: error: n1: task 1: Aborted (core dumped)", 134),
        ("srun: Job 7 step creation temporarily disabled, retrying", 0),
    ],
)
def test_the_task_that_is_the_cause_decides(text: str, code: int) -> None:
    assert reported_code(text) == code


def test_all_tasks_that_srun_names_have_ended() -> None:
    text = "srun: error: n1: tasks 3-5,7: Killed\nsrun: error: n0: task 12: Exited with exit code 1"
    assert ended_tasks(text, 16) == {3, 4, 5, 7, 12} and ended_tasks(text, 5) == {3, 4}
    assert ended_tasks("srun: error: n1: tasks 1-,,4: Killed\nsrun: n0: task 0-99999999999: Killed", 3) == {0, 1, 2}


@pytest.mark.parametrize(
    ("ended", "how", "code", "said"),
    [
        ("tasks 0-1", "Exited with exit code 1", 1, "left with exit code 1"),
        ("task 0", "Exited with exit code 1", 1, "left with exit code 1"),
        ("task 0", "Aborted (core dumped)", 134, "was killed by SIGABRT"),
    ],
)
def test_the_ranks_of_a_step_that_hang_are_named_with_their_nodes(
    tmp_path: Path, ended: str, how: str, code: int, said: str
) -> None:
    """Task 0 waited in vain for task 2; task 1 did, too, and has either ended or not come to its end yet."""
    (tmp_path / "trainer_1.log").write_text("RuntimeError: [gloo] Timed out waiting 6000ms for recv operation\n")
    step = python(
        "trainer",
        0,
        f"""
        import time
        print("RuntimeError: Timed out waiting", file=open("{tmp_path}/trainer_0.log", "w"), flush=True)
        print("srun: error: n0: {ended}: {how}", flush=True)
        time.sleep(60)
        """,
        task_nodes=("n0", "n0", "n1"),
        shown_log="trainer_0.log",
    )
    step = replace(step, log="srun_trainer.log")
    outcome = supervise([step], tmp_path, grace_s=1)
    assert outcome.code == code and outcome.killed
    assert outcome.cause == f"trainer 0 {said}: waited in vain for trainer 2 on n1 (run.timeout_s)"
