"""When a supervisor starts and ends engines on GPUs that the trainer has, too."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.rollout import supervisor
from megatron_vcppo.rollout.node_folder import TRAINER, NodeFolder
from megatron_vcppo.rollout.rendezvous import SECRET, engines
from megatron_vcppo.rollout.supervisor import Limits, Slot
from megatron_vcppo.run.processes import alive
from megatron_vcppo.run.secret import make_secret
from tests.helpers.engines import wait_until

ENGINE = """
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from megatron_vcppo.rollout.auth import PROOF_HEADER, authorized_call

secret = Path(sys.argv[3]).read_text()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        headers = [(b"authorization", self.headers["Authorization"].encode())]
        call = authorized_call(headers, self.command, self.path, os.environ["VCPPO_ENGINE_PLACE"], secret)
        self.send_response(200)
        self.send_header(PROOF_HEADER.lower(), call.proof(secret))  # as HTTP servers write it
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self):
        Path(sys.argv[2]).touch()
        self.do_GET()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""What a supervisor sees of an engine: it proves that it holds the secret, answers, and goes to sleep."""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[NodeFolder]:
    """It is the turn of a trainer that lives."""
    make_secret(tmp_path / SECRET)
    with NodeFolder(tmp_path, 0) as shared, shared.hold(TRAINER):
        shared.give_turn("trainer")
        yield shared


def make_slot(shared: NodeFolder, folder: Path, turn_timeout_s: float) -> Slot:
    limits = Limits(30.0, 1.0, max_restarts=0, poll_s=0.1, turn_timeout_s=turn_timeout_s)

    def launch(port: int) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", ENGINE, str(port), str(folder / "asleep"), str(folder / SECRET)], dict(os.environ)

    return Slot(0, 3, "127.0.0.1", folder, folder / "engine.log", limits, launch, shared)


def test_the_wait_for_a_turn_has_a_deadline_and_says_what_it_waits_for(shared: NodeFolder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"engine_0_3 waits to start.*within 0.5 s \(rollout.turn_timeout_s\)"):
        make_slot(shared, tmp_path, 0.5).keep_running(threading.Event())
    assert not (tmp_path / "engine.log").exists(), "nothing was started"
    stopping = threading.Event()
    stopping.set()
    make_slot(shared, tmp_path, 60.0).keep_running(stopping)


def test_an_engine_is_marked_while_it_starts_and_while_it_is_ended(
    shared: NodeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two it is published, asleep, and can be asked. No restart is allowed; the wait counts as none."""
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 2.0)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT_S", 1.0)
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
    wait_until(lambda: shared.starting() == ["engine_0_3"], 20, "the engine starts")
    wait_until(lambda: engines(tmp_path), 20, "the engine is published")
    wait_until(lambda: not shared.starting(), 5, "the engine starts no more")
    assert (tmp_path / "asleep").exists(), "it was published before it slept"
    (engine,) = engines(tmp_path)
    os.kill(engine.pid, signal.SIGSTOP)
    wait_until(lambda: not engines(tmp_path), 30, "the hung engine is withdrawn")
    assert alive(engine.pid) and shared.starting() == ["engine_0_3"]
    thread.join(30)
    assert errors and "ended 1 times: no answer to health checks for 1 s" in errors[0]
    assert not alive(engine.pid) and shared.starting() == []
