"""Generation during which engines may come and go: while leaders wait for responses, all ranks tend the engines."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megatron_vcppo.weight_sync.sync import Source, WeightSync, WeightSyncError, log

T = TypeVar("T")

TICK_S = 0.5


def generate_with_joiners(
    sync: WeightSync, policy_version: int, source: Source, produce: Callable[[], T] | None
) -> T | None:
    """Run ``produce`` (a client's generate) in a thread on the ranks that have one; collective over all ranks.

    Meanwhile an engine that was restarted gets the current weights as soon as it answers, and the clients take it
    back in. Returns produce's result; raises on every rank if it raised on any.
    """
    with ThreadPoolExecutor(1, "generate") as pool:
        future: Future[T] | None = pool.submit(produce) if produce else None
        while True:
            states = sync.exchange(_state(future))
            failures = [f"rank {rank}: {state}" for rank, state in enumerate(states) if state not in ("", "running")]
            if failures:
                if future and future.done():
                    future.result()
                raise RuntimeError(f"generation failed on {'; '.join(failures)}")
            if "running" not in states:
                return future.result() if future else None
            try:
                sync.update_joiners(policy_version, source)
            except WeightSyncError as error:
                log.warning("%s; its supervisor starts it again", error)
            time.sleep(TICK_S)


def _state(future: Future | None) -> str:
    if future is None:
        return ""
    if not future.done():
        return "running"
    error = future.exception()
    return f"{type(error).__name__}: {error}" if error else ""
