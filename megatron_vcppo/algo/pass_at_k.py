"""pass@k and avg@k from n samples per problem, with 95 % intervals over problems."""

import math
from collections.abc import Sequence

Z_95 = 1.959964


def pass_at_k(results: Sequence[Sequence[bool]], k: int) -> tuple[float, float]:
    """(estimate, half width of the 95 % interval) of the chance that at least one of k samples is correct.

    results: one row of n ≥ k verdicts per problem. Unbiased: 1 - C(n - c, k) / C(n, k), with c correct ones of n (Chen
    et al., arXiv 2107.03374, Eq. 1), averaged over problems; the interval is the normal one of that mean.
    """
    return _mean([1.0 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in results])


def avg_at_k(results: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """(share of correct samples, half width of its 95 % interval).

    results: one non-empty row of verdicts per problem. Samples of one problem are not independent, so the interval is
    that of the mean over problems.
    """
    return _mean([sum(row) / len(row) for row in results])


def _mean(values: Sequence[float]) -> tuple[float, float]:
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, Z_95 * math.sqrt(variance / count)
