"""A deadline for waits that have none of their own, such as those for the processes that write a checkpoint."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deadline(what: str, timeout_s: float, progress: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End this process with exit code 1 if the block hangs: not done, and no other ``progress()`` for ``timeout_s``.

    Such a wait cannot be interrupted, so there is no exception: the stacks of all threads and ``what`` are printed to
    stderr. progress: called every few seconds in a thread; must not raise.
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
                print(f"{what} has made no progress for {timeout_s:g} s", file=sys.stderr, flush=True)
                os._exit(1)

    watcher = threading.Thread(target=watch, name=f"deadline of {what}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
