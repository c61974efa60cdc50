"""How far apart the points are where a stage can stop, as the log says it."""

import os
import signal

import pytest

from megatron_vcppo.stages import stopping as stopping_module
from megatron_vcppo.stages.stopping import Stopping


def test_the_longest_piece_is_measured_without_the_start_and_without_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping_module.time, "monotonic", lambda: now)
    stopping = Stopping()

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    wait(500)  # imports, loading
    assert not stopping.requested() and stopping.metrics(0.0) == {}
    for seconds in (2, 7, 3):
        wait(seconds)
        stopping.requested()
    wait(1)
    with stopping.saving():
        wait(90)
    wait(4)
    assert stopping.metrics(85.0) == {"stopping/longest_piece_s": 7.0, "stopping/save_s": 85.0}
    stopping.requested()
    assert stopping.metrics(85.0)["stopping/longest_piece_s"] == 4.0, "the log does not divide a piece"


def test_a_signal_only_sets_a_flag() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)]
    stopping = Stopping()
    stopping.listen()
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stopping.requested() and stopping.requested()
    finally:
        for number, handler in zip((signal.SIGUSR2, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
