"""Waiting for the main rank: as long as it gets on, and not longer."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_vcppo.config.schema import ParallelConfig
from megatron_vcppo.mcore import runtime
from tests.helpers.distributed import RanksFailed, run_distributed_test


def wait_for_main(beats: bool, timeout_s: float = 0.8) -> list[Any]:
    """Two ranks; the main one works for three deadlines, and says that it gets on if ``beats``."""

    def body() -> float:
        runtime.start(ParallelConfig(), seed=0, timeout_s=60)
        runtime._timeout_s, runtime.BEAT_S = timeout_s, 0.1

        def work(beat: Callable[[], None]) -> None:
            end = time.monotonic() + 3 * timeout_s
            while time.monotonic() < end:
                time.sleep(0.02)
                if beats:
                    beat()

        started = time.monotonic()
        runtime.on_main(work, "counting")
        return time.monotonic() - started

    return run_distributed_test(body, 2)


def test_ranks_wait_for_a_main_rank_that_gets_on() -> None:
    assert min(wait_for_main(beats=True)) > 2


def test_a_main_rank_that_does_not_get_on_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"TimeoutError: counting on rank 0 has made no progress for 0\.8 s"):
        wait_for_main(beats=False)
