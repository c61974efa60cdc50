"""Generation during which engines may come and go: while leaders wait for responses, all ranks tend the engines.

It begins without a collective, so that ranks may train meanwhile; the wait for its end is one.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from megatron_vcppo.errors import Stopped
from megatron_vcppo.weight_sync.sync import Source, WeightSync, WeightSyncError, log

T = TypeVar("T")

TICK_S = 0.5
"""How often the engines are looked after meanwhile."""


def begin(produce: Callable[[], T] | None) -> Future[T] | None:
    """Run ``produce`` (a client's generate) in a new thread, on the ranks that have one."""
    if produce is None:
        return None
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(produce())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: a stage that is asked to stop does not wait for responses.
    threading.Thread(target=run, name="generate", daemon=True).start()
    return future


def finish_with_joiners(
    sync: WeightSync,
    policy_version: int,
    source: Source,
    future: Future[T] | None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> T | None:
    """Wait until every rank's future is done; collective over all ranks.

    Meanwhile an engine that was restarted gets the current weights as soon as it answers, and the clients take it
    back in. Returns this rank's result; raises on every rank if it raised on any, and Stopped on every rank if any
    rank was asked to stop before all were done.
    """
    while True:
        failure = _failure(future)
        failed, running, stops = sync.ranks.any(bool(failure), _is_running(future), stop_requested())
        if failed:
            failures = [f"rank {rank}: {text}" for rank, text in sync.ranks.texts(failure)]
            if future and future.done():
                future.result()
            raise RuntimeError(f"generation failed on {'; '.join(failures)}")
        if not running:
            return future.result() if future else None
        if stops:
            raise Stopped
        try:
            sync.update_joiners(policy_version, source)
        except WeightSyncError as error:
            log.warning("%s; its supervisor starts it again", error)
        if future is not None:  # ranks that generate nothing wait for these in the next collective
            wait([future], TICK_S)


def _is_running(future: Future | None) -> bool:
    return future is not None and not future.done()


def _failure(future: Future | None) -> str:
    error = future.exception() if future is not None and future.done() else None
    return f"{type(error).__name__}: {error}" if error else ""
