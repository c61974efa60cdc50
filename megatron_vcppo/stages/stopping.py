"""A request to stop: the flag that a signal sets, the points where all ranks agree on it, and the time between them.

A stage reaches such a point between steps, between the phases of an iteration, between the optimizer steps of an
update, and every half second while engines generate. The launcher reads from the metrics how long a stop may need.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vcppo.errors import Stopped
from megatron_vcppo.run.metrics_log import LONGEST_PIECE, SAVE_TIME


class Saved(Exception):
    """Ends a stage that saved because it was asked to stop."""


class Stopping:
    """Whether this process was asked to stop, and the longest time that it could not have."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._last_point: float | None = None
        """None until the first one: what comes before it is the start of the stage, which a stop may cut short."""
        self._longest_s = 0.0

    def listen(self) -> None:
        """From now on USR2 and TERM only set a flag: a handler must not save, the stage does at its next point."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda *_: self._requested.set())

    def requested(self) -> bool:
        """Whether this rank was asked to stop; the ranks must agree on it before they act. Called at every point."""
        now = time.monotonic()
        if self._last_point is not None:
            self._longest_s = max(self._longest_s, now - self._last_point)
        self._last_point = now
        return self._requested.is_set()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: all ranks call it at the same points."""
        from megatron_vcppo.mcore import runtime  # the entry point listens before anything imports torch

        return runtime.any_rank(self.requested())

    def point(self) -> None:
        """Raise Stopped on every rank if any was asked to stop; collective."""
        if self.agreed():
            raise Stopped

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The time within is that of a checkpoint, which is measured there: no piece of work."""
        self.requested()
        yield
        self._last_point = time.monotonic()

    def metrics(self, save_time_s: float) -> dict[str, float]:
        """For the log: the longest piece since the last call, and the last save's time if there was a save."""
        found = {LONGEST_PIECE: self._longest_s, SAVE_TIME: save_time_s}
        self._longest_s = 0.0
        return {name: seconds for name, seconds in found.items() if seconds}


stopping = Stopping()
"""Of this process."""
