"""The wait for responses, without engines."""

import time

import torch

from megatron_vcppo.config.rollout import WeightSyncConfig
from megatron_vcppo.weight_sync import generation
from megatron_vcppo.weight_sync.plan import SINGLE
from megatron_vcppo.weight_sync.sync import WeightSync
from megatron_vcppo.weight_sync.transport import NetworkTransport


def test_the_wait_ends_with_the_last_response_and_not_at_the_next_look_at_the_engines(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generation, "TICK_S", 60.0)
    transport = NetworkTransport("127.0.0.1", torch.device("cpu"), 1 << 16, 10.0)
    sync = WeightSync(WeightSyncConfig(), tmp_path, SINGLE, lambda value: [value], transport)
    started = time.monotonic()

    def produce() -> str:
        time.sleep(0.2)
        return "responses"

    begun = generation.begin(produce)
    assert generation.finish_with_joiners(sync, 0, lambda: iter(()), begun) == "responses"
    assert 0.2 <= time.monotonic() - started < 30
