"""The completion script, as a shell uses it."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_vcppo.cli import COMMANDS, main
from megatron_vcppo.commands.completion import script


@pytest.fixture(scope="module")
def bash_script() -> str:
    return script("bash")


def complete(text: str, *words: str) -> set[str]:
    """What bash offers at the last of these words of a command line."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _vcppo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{text}\n{ask}"], capture_output=True, text=True, timeout=20, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_options_choices_and_keys(bash_script: str) -> None:
    assert complete(bash_script, "vcppo", "") == set(COMMANDS)
    assert complete(bash_script, "vcppo", "re") == {"report", "resume"}
    assert {"--until", "--only", "--from"} <= complete(bash_script, "vcppo", "run", "x.yaml", "--")
    assert complete(bash_script, "vcppo", "completion", "z") == {"zsh"}
    assert complete(bash_script, "vcppo", "convert", "") == {"import", "export"}
    keys = complete(bash_script, "vcppo", "run", "x.yaml", "sft.optimizer.")
    assert "sft.optimizer.lr=" in keys and all(key.startswith("sft.optimizer.") for key in keys)
    assert complete(bash_script, "vcppo", "status", "sft.optimizer.") == set(), "it takes no keys"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_reads_it(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    subprocess.run([shell, "-n", str(path)], check=True, timeout=20)


def typed_into_zsh(folder: Path, *lines: str) -> str:
    """What an interactive zsh, which has read the script as ~/.zshrc would, makes of lines with tabs in them."""
    (folder / "script").write_text(script("zsh"))
    start = [f"source {folder}/script", 'vcppo() { print -r -- GOT "$@" }']
    main_side, shell_side = pty.openpty()
    env = {"HOME": str(folder), "ZDOTDIR": str(folder), "TERM": "dumb", "PATH": os.environ["PATH"]}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"],
        stdin=shell_side,
        stdout=shell_side,
        stderr=shell_side,
        cwd=folder,
        env=env,
        start_new_session=True,
    )
    os.close(shell_side)
    shown, end = b"", time.monotonic() + 20
    os.write(main_side, "\n".join([*start, *lines, "exit", ""]).encode())
    try:
        while time.monotonic() < end and select.select([main_side], [], [], max(0.0, end - time.monotonic()))[0]:
            shown += os.read(main_side, 65536)
    except OSError:  # the shell has left, and its side is closed
        pass
    finally:
        shell.kill()
        shell.wait()
        os.close(main_side)
    return shown.decode(errors="replace")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_commands_options_choices_keys_and_files(tmp_path: Path) -> None:
    (tmp_path / "my-run").mkdir()
    lines = ["vcppo resu\tRUN", "vcppo run x.yaml --unt\tppo sft.optimizer.l\t1", "vcppo completion z\t"]
    shown = typed_into_zsh(tmp_path, *lines, "vcppo status my\t", "vcppo status sft.optimizer.l\t")
    got = [line.strip() for line in shown.splitlines() if line.startswith("GOT")]
    assert got == [
        "GOT resume RUN",
        "GOT run x.yaml --until ppo sft.optimizer.lr=1",
        "GOT completion zsh",
        "GOT status my-run",
        "GOT status sft.optimizer.l",
    ], shown
