"""Waiting for the main rank: as long as it makes progress, and not longer."""

import dataclasses
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.config.network import listen
from megatron_vcppo.launch.controller import PORT_TAKEN
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.ranks_store import ranks_store
from tests.helpers.distributed import RanksFailed, run_distributed_test


def wait_for_main(beats: bool, timeout_s: float = 0.8) -> None:
    """Two ranks; the main one works for three deadlines, and reports progress if ``beats``."""

    def body() -> None:
        runtime.start(ParallelConfig(), seed=0, timeout_s=60)
        runtime._runtime = dataclasses.replace(runtime.current(), timeout_s=timeout_s)
        runtime.BEAT_S = 0.1

        def work(beat: Callable[[], None]) -> None:
            end = time.monotonic() + 3 * timeout_s
            while time.monotonic() < end:
                time.sleep(0.02)
                if beats:
                    beat()

        runtime.on_main(work, "counting")

    run_distributed_test(body, 2)


def test_ranks_wait_for_a_main_rank_that_gets_on() -> None:
    wait_for_main(beats=True, timeout_s=2.0)


def _exit_of_the_main_rank() -> None:
    runtime.start(ParallelConfig(), seed=0, timeout_s=30)
    if os.environ["RANK"] != "0":
        time.sleep(0.5)  # not yet waiting when the main rank is done
    runtime.on_main(lambda beat: None, "nothing")


def test_the_main_rank_leaves_after_the_others_have_heard_that_it_is_done() -> None:
    """The store that they ask lives in its process."""
    for _ in range(3):
        run_distributed_test(_exit_of_the_main_rank, 3)


def test_a_main_rank_that_does_not_get_on_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"TimeoutError: counting on rank 0 has made no progress for 0\.8 s"):
        wait_for_main(beats=False)


def _reach_the_store_elsewhere() -> str:
    runtime.start(ParallelConfig(), seed=0, timeout_s=30)
    try:
        socket.create_connection(("127.0.0.2", int(os.environ["MASTER_PORT"])), 5).close()
    except ConnectionRefusedError:
        return "refused"
    return "reached"


def test_the_ranks_store_listens_on_the_masters_address_alone() -> None:
    assert run_distributed_test(_reach_the_store_elsewhere, 2) == ["refused", "refused"]


def _a_taken_port() -> str:
    with listen("127.0.0.1") as listener:
        os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
        try:
            ranks_store(0, 1, timedelta(seconds=5))
        except OSError as error:
            return str(error)
    return ""


def test_a_taken_port_of_the_store_is_named_as_the_controller_looks_for_it() -> None:
    assert PORT_TAKEN in run_distributed_test(_a_taken_port, 1)[0]
