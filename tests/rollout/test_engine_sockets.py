"""Where an engine's unix sockets are, and that none is left."""

import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.rollout.engine_sockets import IN_USE, MIN_AGE_S, VARIABLE, socket_folder
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.rollout.supervisor import Limits, Slot
from megatron_vcppo.run.secret import make_secret


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of all users, with a short name as they have; pytest has made its own elsewhere before."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def made_old(path: Path) -> None:
    then = path.stat().st_mtime - 2 * MIN_AGE_S
    os.utime(path, (then, then))


def test_a_killed_supervisors_folder_is_removed_by_the_next_one_and_a_living_ones_is_not(temporary: Path) -> None:
    code = (
        "import os, signal, tempfile, sys; tempfile.tempdir = sys.argv[1]\n"
        "from megatron_vcppo.rollout.engine_sockets import socket_folder\n"
        "with socket_folder() as path:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(temporary)], timeout=60)
    (left,) = temporary.iterdir()
    made_old(left)
    with socket_folder() as mine:
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700 and not left.exists()
        made_old(mine)
        with socket_folder() as other:
            assert other != mine and (mine / IN_USE).exists(), "its supervisor lives"
    assert not list(temporary.iterdir())


def test_an_engine_gets_the_folder_and_what_it_leaves_there_goes_with_it(temporary: Path, tmp_path: Path) -> None:
    make_secret(tmp_path / SECRET)

    def launch(port: int) -> tuple[list[str], dict[str, str]]:
        return ["/bin/sh", "-c", f"touch ${VARIABLE}/socket; ls ${VARIABLE}; echo ${VARIABLE}"], dict(os.environ)

    slot = Slot(0, 0, "127.0.0.1", tmp_path, tmp_path / "log", Limits(30.0, 1.0, max_restarts=0, poll_s=0.1), launch)
    with pytest.raises(RuntimeError, match="ended 1 times"):
        slot.keep_running(threading.Event())
    *names, folder = (tmp_path / "log").read_text().split()
    assert names == [IN_USE, "socket"] and Path(folder).parent == temporary and not list(temporary.iterdir())


def test_a_path_of_a_socket_is_never_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with socket_folder() as folder:
        assert len(f"{folder}/{'0' * 36}") < 108
