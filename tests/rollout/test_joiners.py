"""The wait for responses, without engines."""

import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.weight_sync import joiners
from megatron_vcppo.weight_sync.push_plan import SINGLE
from megatron_vcppo.weight_sync.sync import WeightSync
from megatron_vcppo.weight_sync.transport import NetworkTransport


def make_sync(folder: Path, ranks: RankGroup | None = None) -> WeightSync:
    transport = NetworkTransport("127.0.0.1", torch.device("cpu"), 1 << 16, 10.0, lambda: "secret")
    return WeightSync(WeightSyncConfig(), folder, SINGLE, ranks or RankGroup(60.0), transport)


def test_the_wait_ends_with_the_last_response_and_not_at_the_next_look_at_the_engines(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(joiners, "TICK_S", 3600.0)
    sync = make_sync(tmp_path)

    def produce() -> str:
        time.sleep(0.2)
        return "responses"

    begun = joiners.begin(produce)
    assert joiners.finish_with_joiners(sync, 0, lambda: iter(()), begun) == "responses"


def test_a_stop_on_any_rank_ends_the_wait_on_all_but_not_when_all_are_done(tmp_path: Path) -> None:
    class WithARankThatStops(RankGroup):
        def any(self, *flags: bool) -> tuple[bool, ...]:
            return (*flags[:-1], True)

    sync, release = make_sync(tmp_path, WithARankThatStops(60.0)), threading.Event()
    begun = joiners.begin(lambda: release.wait(60))
    with pytest.raises(Stopped):
        joiners.finish_with_joiners(sync, 0, lambda: iter(()), begun)
    release.set()
    assert begun is not None and begun.result(60)
    assert joiners.finish_with_joiners(sync, 0, lambda: iter(()), begun), "what is complete is taken"
    with pytest.raises(Stopped):
        sync.wait_for_engines(1, 60.0)
