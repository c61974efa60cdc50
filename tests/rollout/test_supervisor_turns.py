"""When a supervisor starts and ends engines on GPUs that the trainer has, too; the engine here never answers."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.rollout import supervisor
from megatron_vcppo.rollout.auth import make_secret
from megatron_vcppo.rollout.node_folder import TRAINER, NodeFolder
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.rollout.supervisor import Limits, Slot
from tests.rollout.test_node import wait_until

MUTE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[NodeFolder]:
    """It is the turn of a trainer that lives."""
    make_secret(tmp_path / SECRET)
    with NodeFolder(tmp_path, 0) as shared, shared.hold(TRAINER):
        shared.give_turn("trainer")
        yield shared


def make_slot(shared: NodeFolder, folder: Path, turn_timeout_s: float) -> Slot:
    limits = Limits(
        start_timeout_s=1.0, health_timeout_s=1.0, max_restarts=0, poll_s=0.1, turn_timeout_s=turn_timeout_s
    )
    log = folder / "engine.log"
    return Slot(0, 3, "127.0.0.1", folder, log, limits, lambda port: ([sys.executable, "-c", MUTE], {}), shared)


def test_the_wait_for_a_turn_has_a_deadline_and_says_what_it_waits_for(shared: NodeFolder, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"engine_0_3 waits to start.*within 0.5 s \(rollout.turn_timeout_s\)"):
        make_slot(shared, tmp_path, 0.5).keep_running(threading.Event())
    assert 0.5 <= time.monotonic() - started < 5
    assert not (tmp_path / "engine.log").exists(), "nothing was started"
    stopping = threading.Event()
    stopping.set()
    make_slot(shared, tmp_path, 60.0).keep_running(stopping)


def test_an_engine_is_marked_from_its_start_until_its_last_process_is_gone(
    shared: NodeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No restart is allowed, so one start is all; the wait for the turn counts as none."""
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 1.0)
    errors: list[str] = []

    def keep() -> None:
        try:
            make_slot(shared, tmp_path, 60.0).keep_running(threading.Event())
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=keep)
    thread.start()
    time.sleep(1.0)
    assert shared.starting() == [] and not (tmp_path / "engine.log").exists()
    shared.give_turn("engines")
    wait_until(lambda: (tmp_path / "engine.log").exists(), 10, "the engine starts")
    shared.give_turn("trainer")
    while thread.is_alive() and not errors:
        seen = shared.starting()
        assert seen == ["engine_0_3"] or not thread.is_alive() or errors or _ends(thread)
        time.sleep(0.05)
    thread.join(10)
    assert errors and "ended 1 times: not ready 1 s after its start" in errors[0]
    assert shared.starting() == []


def _ends(thread: threading.Thread) -> bool:
    """The mark goes a moment before the thread does."""
    thread.join(1.0)
    return not thread.is_alive()
