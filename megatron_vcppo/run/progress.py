"""How far a long piece of work is: a line now and then, with rate and ETA.

Lines and no bar: the processes of a stage write to log files, and what a terminal shows of a local run is the main
rank's file, followed as it grows.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

from megatron_vcppo.run.log import line

WINDOW = 20
"""Updates over which rate and ETA are averaged."""


class Progress:
    """Progress from ``start`` to ``total``.

    A line is printed at most every ``every_s`` seconds and at the end:
    ``sft 12/60 20% | 1.52k tok/s | ETA 00:42 | loss 1.23 lr 1.0e-03``.
    """

    def __init__(
        self,
        name: str,
        total: int,
        start: int = 0,
        unit: str = "it",
        every_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """unit: what ``update`` counts next to the position, such as tok. clock: seconds."""
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.position = start
        self.stream = stream or sys.stdout
        self._clock = clock
        self._printed_at = clock()
        self._history = deque([(self._printed_at, start, 0)], maxlen=WINDOW + 1)

    def update(self, position: int, count: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Now at ``position``, having worked through ``count`` more units; ``values`` end the line."""
        now = self._clock()
        self.position = position
        self._history.append((now, position, self._history[-1][2] + count))
        if position >= self.total or self._is_due(now):
            self._print(now, values or {})

    def wait(self, values: Mapping[str, float]) -> None:
        """Nothing new: the same position with ``values``, once a line is due."""
        now = self._clock()
        if self._is_due(now):
            self._print(now, values)

    def _is_due(self, now: float) -> bool:
        return now - self._printed_at >= self.every_s

    def _print(self, now: float, values: Mapping[str, float]) -> None:
        self._printed_at = now
        share = f"{100 * self.position // self.total}%" if self.total else "100%"
        text = f"{self.name} {self.position}/{self.total} {share} {self.status(values)}"
        print(line(text), file=self.stream, flush=True)

    def status(self, values: Mapping[str, float]) -> str:
        """Rate, ETA and values as text."""
        (then, position_then, count_then), (now, position, count) = self._history[0], self._history[-1]
        seconds = max(now - then, 1e-9)
        parts = [f"| {_with_prefix((count - count_then) / seconds)} {self.unit}/s"]
        if position > position_then:
            eta_s = (self.total - position) * seconds / (position - position_then)
            parts.append(f"| ETA {_clock_time(eta_s)}")
        if values:
            parts.append("| " + " ".join(f"{name} {_short(value)}" for name, value in values.items()))
        return " ".join(parts)


def _with_prefix(value: float) -> str:
    """Three digits. Example: 1524.2 → 1.52k."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}T"


def _clock_time(seconds: float) -> str:
    """Example: 42 → 00:42, 3723 → 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
