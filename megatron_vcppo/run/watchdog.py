"""A deadline for waits that have none of their own, such as those for the processes that write a checkpoint."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_vcppo.run.exit_codes import FAILED
from megatron_vcppo.run.log import say


@contextmanager
def deadline(what: str, timeout_s: float, progress: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End this process as failed if the block hangs: not done, and no other ``progress()`` for ``timeout_s``.

    Such a wait cannot be interrupted, so there is no exception: the stacks of all threads and ``what`` are printed.
    progress: called every few seconds in a thread; must not raise.
    """
    done = threading.Event()

    def watch() -> None:
        seen, since = progress(), time.monotonic()
        while not done.wait(min(10.0, timeout_s / 5)):
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                faulthandler.dump_traceback()
                say(f"{what} has made no progress for {timeout_s:g} s")
                os._exit(FAILED)

    watcher = threading.Thread(target=watch, name=f"deadline of {what}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
