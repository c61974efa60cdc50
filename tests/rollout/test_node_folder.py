"""The folder that trainer and engines of a node share: turns, locks that die with their process, nothing left over."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vcppo.errors import UserError, system_error
from megatron_vcppo.rollout import node_folder
from megatron_vcppo.rollout.node import plan_slots
from megatron_vcppo.rollout.node_folder import (
    TRAINER,
    USERS,
    Hold,
    NodeFolder,
    check_message_room,
    is_held,
    remove_stale,
    weights_path,
)
from tools.benchmarks._tiny_chains import tiny_config, wait_until

HOLDER = """
import sys, time
from pathlib import Path
from megatron_vcppo.rollout.node_folder import NodeFolder
from tools.benchmarks._tiny_chains import wait_until
node = NodeFolder(Path(sys.argv[1]), 0)
hold = node.hold(sys.argv[2])
node.weights.mkdir()
(node.weights / "part").write_bytes(b"x" * 1000)
node.give_turn("trainer")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeFolder]:
    with NodeFolder(tmp_path, 0) as node:
        yield node
    assert not node.path.exists()


def start_holder(rendezvous: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(rendezvous), name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def test_the_turn_of_a_killed_trainer_is_over_and_its_weights_are_removed(node: NodeFolder, tmp_path: Path) -> None:
    assert node.engines_turn, "nobody has said anything"
    trainer = start_holder(tmp_path, TRAINER)
    assert not node.engines_turn and node.is_held(TRAINER)
    node.drop_orphans()
    assert node.weights.exists(), "the trainer lives"
    kill(trainer)
    assert node.engines_turn
    node.drop_orphans()
    assert not node.weights.exists()


def test_a_starting_engine_is_seen_as_long_as_its_supervisor_lives(node: NodeFolder, tmp_path: Path) -> None:
    supervisor = start_holder(tmp_path, "starting_engine_0_1")
    with node.hold("starting_engine_0_0"):
        assert node.starting() == ["engine_0_0", "engine_0_1"]
    kill(supervisor)
    assert node.starting() == []


def test_the_last_user_removes_the_folder_and_the_next_start_what_was_killed(tmp_path: Path) -> None:
    first, second = NodeFolder(tmp_path, 0), NodeFolder(tmp_path, 0)
    first.close()
    assert second.path.exists() and second.is_held(USERS)
    remove_stale()
    assert second.path.exists(), "somebody uses it"
    second.close()
    assert not second.path.exists()
    kill(start_holder(tmp_path, TRAINER))
    assert weights_path(tmp_path, 0).exists()
    remove_stale()
    assert not first.path.exists()


def test_what_others_put_there_stays_and_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_folder, "ROOT", tmp_path)
    mine, linked, pipe = (tmp_path / f"vcppo_{os.getuid()}_{name}" for name in ("mine", "linked", "pipe"))
    for folder in (mine, pipe, tmp_path / "elsewhere"):
        folder.mkdir()
        (folder / USERS).touch()
    linked.symlink_to(tmp_path / "elsewhere")
    (pipe / USERS).unlink()
    os.mkfifo(pipe / USERS)
    lstat = Path.lstat

    def of_another_user(path: Path) -> os.stat_result:
        found = [*lstat(path)]
        found[stat.ST_UID] += path == pipe
        return os.stat_result(found)

    with ThreadPoolExecutor(1) as pool:  # in a thread, so that one that waits for the pipe's writer fails the test
        done = pool.submit(is_held, pipe / USERS)
        try:
            assert done.result(timeout=20) is False
        finally:
            os.close(os.open(pipe / USERS, os.O_RDWR | os.O_NONBLOCK))
    monkeypatch.setattr(Path, "lstat", of_another_user)
    remove_stale()
    assert not mine.exists() and pipe.exists() and (tmp_path / "elsewhere" / USERS).exists()


def test_the_folder_is_private(tmp_path: Path) -> None:
    node = NodeFolder(tmp_path, 0)
    assert node.path.stat().st_mode & 0o777 == 0o700
    node.path.chmod(0o755)
    with pytest.raises(UserError, match="not a folder of this user alone"):
        NodeFolder(tmp_path, 0)
    node.path.chmod(0o700)
    node.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    node.path.symlink_to(elsewhere)
    try:
        with pytest.raises(UserError, match="not a folder of this user alone"):
            NodeFolder(tmp_path, 0)
    finally:
        node.path.unlink()


def test_weights_that_do_not_fit_are_refused_with_the_numbers(node: NodeFolder) -> None:
    node.check_space(1 << 20)
    with pytest.raises(UserError, match=r"GiB are free on .* take 1048576.0 GiB.*weight_sync.transport disk"):
        node.check_space(1 << 50)


def test_nodes_and_stages_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert weights_path(tmp_path / "link", 0) == weights_path(tmp_path, 0)
    assert len({weights_path(tmp_path, 0), weights_path(tmp_path, 1), weights_path(tmp_path / "other", 0)}) == 3
    assert os.getuid() == NodeFolder(tmp_path, 0).path.stat().st_uid
    time.sleep(0)
    remove_stale()


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_full_memory_of_the_node_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "shm"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "none", str(memory)], check=True)
    monkeypatch.setattr(node_folder, "ROOT", memory)
    try:
        with pytest.raises(OSError, match="No space left") as failure:
            NodeFolder(tmp_path, 0)
    finally:
        subprocess.run(["umount", str(memory)], check=True)
    line = str(system_error(failure.value))
    assert line.startswith(str(memory)) and "No space left on device: make room" in line


@pytest.mark.parametrize("left", ["file", "folder", "nothing"])
def test_too_little_memory_for_the_messages_of_engine_workers_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(node_folder, "ROOT", tmp_path)
    monkeypatch.setattr(node_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=200 << 20))
    (tmp_path / "small").write_bytes(b"x" if left != "nothing" else b"")
    big = tmp_path / "big"
    if left == "folder":
        big.mkdir()
    if left != "nothing":
        (big / "part" if left == "folder" else big).write_bytes(bytes(2 << 20))
    check_message_room(3)
    with pytest.raises(UserError) as failure:
        check_message_room(4)
    line = f"{tmp_path}: 200 MiB are free on {os.uname().nodename}, and 4 engine workers need 256 MiB for messages: "
    advice = f", or remove {big} (2 MiB) if its process has ended" if left != "nothing" else ""
    assert str(failure.value) == f"{line}enlarge it{advice}"


def test_only_engines_of_several_workers_need_room_for_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    monkeypatch.setattr(node_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert len(plan_slots(config, Path(config.model.hf), tmp_path / "rendezvous", node=0)) == 1
    config.rollout.engine.tp = 2
    with pytest.raises(UserError, match="2 engine workers need 128 MiB"):
        plan_slots(config, Path(config.model.hf), tmp_path / "rendezvous", node=0)


def test_what_is_forked_from_a_holder_does_not_hold(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with Hold(tmp_path / "held"):
        child = os.fork()
        if not child:
            os.read(reading, 1)
            os._exit(0)
    wait_until(lambda: not is_held(tmp_path / "held"), "the child to close it")
    os.write(writing, b"x")
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
