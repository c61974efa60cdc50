"""How far a long piece of work is: a bar on a terminal, a line now and then in a log file; with rate and ETA."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

from megatron_vcppo.run.log import line

WINDOW = 20
"""Updates over which rate and ETA are averaged."""
BAR = "{desc} {n_fmt}/{total_fmt} {bar:20} {postfix}"


class Progress:
    """Progress from ``start`` to ``total``. Use as a context manager, or close it.

    On a terminal one bar is redrawn; elsewhere a line is printed at most every ``every_s`` seconds and at the end:
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
        """unit: what ``update`` counts beside the position, such as tok."""
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.position = start
        self.stream = stream or sys.stdout
        self._clock = clock
        self._printed_at = clock()
        self._history = deque([(self._printed_at, start, 0)], maxlen=WINDOW + 1)
        self._bar = None
        if self.stream.isatty():
            self._bar = tqdm(total=total, initial=start, desc=name, file=self.stream, bar_format=BAR)

    def update(self, position: int, count: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Now at ``position``, having worked through ``count`` more units; ``values`` are shown beside it."""
        now = self._clock()
        self.position = position
        self._history.append((now, position, self._history[-1][2] + count))
        text = self.status(values or {})
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(position - self._bar.n)
        elif position >= self.total or now - self._printed_at >= self.every_s:
            self._printed_at = now
            share = f"{100 * position // self.total}%" if self.total else "100%"
            print(line(f"{self.name} {position}/{self.total} {share} {text}"), file=self.stream, flush=True)

    def status(self, values: Mapping[str, float]) -> str:
        """Rate, ETA and values as text."""
        (then, position_then, count_then), (now, position, count) = self._history[0], self._history[-1]
        seconds = max(now - then, 1e-9)
        parts = [f"| {tqdm.format_sizeof((count - count_then) / seconds)} {self.unit}/s"]
        if position > position_then:
            eta_s = (self.total - position) * seconds / (position - position_then)
            parts.append(f"| ETA {tqdm.format_interval(eta_s)}")
        if values:
            parts.append("| " + " ".join(f"{name} {_short(value)}" for name, value in values.items()))
        return " ".join(parts)

    def close(self) -> None:
        """Leave the bar as it is; safe to call twice."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _short(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
