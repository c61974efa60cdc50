"""The completion script, as a shell uses it."""

import shutil
import subprocess
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
