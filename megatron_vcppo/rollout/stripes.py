"""Which bytes of a bucket each of several senders sends. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vcppo.integers import round_up

PIECE_BYTES = 4 << 20
"""Bytes that travel at once: small enough that a chain of receivers passes them on while the next ones arrive."""
ALIGNMENT = 64
"""Stripes start at multiples of this many bytes."""


@dataclass(frozen=True)
class Stripe:
    """The ``index``-th of ``count`` equal parts, counted from 0, of every bucket."""

    index: int = 0
    count: int = 1


WHOLE = Stripe()
"""Of a single sender."""


def pieces(sizes: Sequence[int], stripe: Stripe) -> Iterator[tuple[int, int, int]]:
    """(payload, start, end) of the stripe's bytes in a bucket whose payloads have these sizes in bytes.

    Stripes of all senders cover every byte once; two of them differ by at most ALIGNMENT bytes. Example: sizes
    [100, 200] in two stripes are (0, 0, 100), (1, 0, 92) and (1, 92, 200).
    """
    first, last = (_boundary(sum(sizes), index, stripe.count) for index in (stripe.index, stripe.index + 1))
    offset = 0
    for payload, size in enumerate(sizes):
        start, end = max(first - offset, 0), min(last - offset, size)
        for begin in range(start, end, PIECE_BYTES):
            yield payload, begin, min(begin + PIECE_BYTES, end)
        offset += size


def _boundary(num_bytes: int, index: int, count: int) -> int:
    return min(num_bytes, round_up(num_bytes * index // count, ALIGNMENT)) if index < count else num_bytes
