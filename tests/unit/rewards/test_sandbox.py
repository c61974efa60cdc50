"""The sandbox: limits on what a program uses, nothing that outlives its verdict, and a choice that is checked."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.rewards.sandbox.inside import seccomp
from megatron_vcppo.rewards.sandbox.isolation import strongest_first
from megatron_vcppo.rewards.sandbox.isolation_choice import _problem, choose
from megatron_vcppo.rewards.sandbox.sandbox import Sandbox, SandboxError, ScratchFolder
from tests.helpers.code_judge import ROOT, Judge, nobody_python

GOOD = {"inputs": ["1 2\n"], "outputs": ["3"]}
ADD = "print(sum(map(int, input().split())))"


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        choose(request.param)
    except UserError as error:
        assert "does not start" in str(error), "it holds nothing back"
        pytest.skip(str(error))
    with Sandbox(request.param, memory_bytes=1 << 28) as sandbox:
        yield sandbox


EXCESSIVE = {
    "memory": ("x = bytearray(1 << 29)", "exit code 1"),
    "memory of many threads": (
        """
        import threading
        hold = [0]
        def take(): hold.append(bytearray(1 << 26))
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print("held", len(hold) - 1)
        """,
        # A MemoryError ends its thread, not the program; what counts is how much could be taken: 8 times 64 MiB, or 4.
        "held [0-4]\n|exit code 1",
    ),
    "files in all": (
        """
        for i in range(1000):
            with open(f"f{i}", "wb") as file: file.write(bytes(1 << 20))
        """,
        "exit code 1|file limit",
    ),
    "number of files": ("for i in range(10**6): open(f'f{i}', 'w')", "exit code 1|file limit"),
    "a large file": ("open('f', 'wb').write(bytes(1 << 25))", "exit code 1"),
    "open files": ("files = [open('f', 'w') for _ in range(100)]", "exit code 1"),
    "output": ("while True: print('x' * 1000000)", "exit code 1"),
    "errors": ("import sys\nfor _ in range(100): sys.stderr.write('x' * 1000000)", "exit code 0"),
    "time": ("while True: pass", "time limit"),
    "ignored signals": (
        """
        import signal
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except OSError: pass
        signal.alarm(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while True: pass
        """,
        "time limit",
    ),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time limit"),
    "a regular expression": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", "time limit"),
    "NUL": ("x = '\0'", "exit code 1"),
    "a surrogate": ("x = '\ud800'", "exit code 1"),
    "a huge program": ("x = 1\n" * 20_000 + "#" * 1_000_000, "exit code 0"),
    "nested parentheses": ("(" * 100_000, "exit code"),
    "a command in place of it": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'while :; do :; done'])", "time limit"),
}


@pytest.mark.parametrize("name", EXCESSIVE)
def test_excess_ends(sandbox: Sandbox, name: str) -> None:
    program, expected = EXCESSIVE[name]
    program = dedent(program)
    outcome = sandbox.script(program, "", time_limit_s=1.0 if expected == "time limit" else 20.0)
    printed = outcome.result.decode() if expected.startswith("held") else ""
    found = printed or outcome.limit or f"exit code {outcome.exit_code}"
    assert re.match(expected, found), outcome
    assert len(outcome.result) <= 16 << 20
    assert sandbox.script(ADD, "1 2", 20.0).result == b"3\n"


LITTER = {
    "a deep tree": "for _ in range(3000): os.mkdir('d'); os.chdir('d')",
    "a tree of long names": "for _ in range(100): os.mkdir('d' * 200); os.chdir('d' * 200)",
    "folders without rights": "os.mkdir('a'); os.mkdir('a/b'); open('a/b/c', 'w'); os.mkdir('a/b/d', 0)",
    "links": "os.symlink('/', 'root'); os.symlink('nowhere', 'x'); os.mkfifo('p'); open('y', 'w'); os.link('y', 'z')",
    "names that are no text": "open(b'\\xff\\n', 'w'); os.mkdir('-rf')",
    "itself": "import shutil\ntry: shutil.rmtree(os.getcwd())\nexcept OSError: pass\nos.symlink('/', 'x')",
    "the folder renamed": "try: os.rename(os.getcwd(), os.getcwd() + 'x')\nexcept OSError: pass",
}


@pytest.mark.parametrize("name", LITTER)
def test_the_scratch_folder_is_empty_for_each_program(sandbox: Sandbox, name: str) -> None:
    program = LITTER[name].replace("; try", "\ntry")
    assert sandbox.script(f"import os\n{program}", "", 20.0).exit_code == 0
    outcome = sandbox.script("import os\nprint(os.listdir('.'))\nopen('x', 'w').write('y')", "", 20.0)
    assert (outcome.exit_code, outcome.result) == (0, b"[]\n")


def test_a_scratch_folder_goes_with_its_sandbox_and_its_killed_owner() -> None:
    with Sandbox("none") as sandbox:
        sandbox.script("import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')", "", 20.0)
        assert sandbox._scratch
        path = Path(sandbox._scratch.path)
        assert path.is_dir() and path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    make = "from megatron_vcppo.rewards.sandbox.sandbox import ScratchFolder; print(ScratchFolder().path)"
    done = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, cwd=ROOT, check=True)
    abandoned, kept = Path(done.stdout.strip()), ScratchFolder()
    assert not abandoned.exists() and Path(kept.path).is_dir()
    kept.remove()


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("user", ["me", "nobody"])
@pytest.mark.parametrize("isolation", ["namespaces", "landlock", "none"])
def test_a_program_ends_with_its_judge(isolation: str, user: str) -> None:
    if user == "nobody" and not nobody_python():
        pytest.skip("only root can become an ordinary user")
    judge = Judge(isolation, user)
    assert judge(ADD, GOOD) == "correct"
    assert judge._process.stdin
    idle, sandbox_processes = len(descendants(judge.pid)), 2 if isolation == "namespaces" else 1
    judge._process.stdin.write(json.dumps(["```python\nwhile True: pass\n```", json.dumps(GOOD), 60.0]) + "\n")
    judge._process.stdin.flush()
    deadline = time.monotonic() + 30
    while len(pids := descendants(judge.pid)) < idle + sandbox_processes + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) > idle + sandbox_processes
    os.kill(judge.pid, signal.SIGKILL)
    judge._process.wait()
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a process of the sandbox is left"
        time.sleep(0.05)


def test_what_a_program_has_started_ends_with_it() -> None:
    """The filter lets no program start a process; where there is none, the first process ends whatever is left."""
    script = """
        import os, signal, sys, time
        from megatron_vcppo.rewards.sandbox.inside import init, kernel
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        ready, write = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.write(write, str(os.getpid()).encode())
                    time.sleep(600)
                time.sleep(600)
            os._exit(0)
        pid = int(os.read(ready, 20))
        init._end_all()
        try: os.kill(pid, 0)
        except ProcessLookupError: print("gone")
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "gone\n", done.stderr


def test_a_sandbox_that_is_ended_is_started_again() -> None:
    with Sandbox("none") as sandbox:
        assert sandbox.script(ADD, "1 2", 20.0).result == b"3\n"
        assert sandbox._process
        sandbox._process.kill()
        with pytest.raises(SandboxError, match=r"the sandbox \(none\) has ended"):
            sandbox.script(ADD, "1 2", 20.0)
        assert sandbox.script(ADD, "1 2", 20.0).result == b"3\n"


def test_what_does_not_isolate_is_refused() -> None:
    assert choose("none") == "none"
    assert choose() in strongest_first()
    # The probe finds out: a way that holds nothing back is no way.
    problem = _problem("none")
    assert "a program can read the user's files, list the user's files, write outside of its folder" in problem
    command = "from megatron_vcppo.rewards.sandbox.isolation_choice import choose; print(choose('bubblewrap'))"
    env = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": os.environ["HOME"]}
    done = subprocess.run([sys.executable, "-S", "-c", command], capture_output=True, text=True, env=env, timeout=60)
    assert "rewards.code.isolation bubblewrap: programs of the model cannot be isolated" in done.stderr
    assert "there is no bwrap" in done.stderr


@pytest.mark.skipif(not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists(), reason="no headers of Linux")
def test_the_numbers_of_system_calls() -> None:
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    for column, header in enumerate(headers):
        known = {}
        for line in Path(header).read_text().splitlines():
            parts = line.split()
            if len(parts) >= 3 and parts[0] == "#define" and parts[2].isdigit():
                known[parts[1].removeprefix("__NR3264_").removeprefix("__NR_")] = int(parts[2])
        for name, numbers in {**seccomp.NUMBERS, **seccomp.DENIED}.items():
            assert known.get(name) == numbers[column], f"{name} in {header}"
