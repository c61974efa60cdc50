"""avg@n, pass@k and maj@k from n samples per problem, with 95 % intervals over problems."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A share and its 95 % interval. Example: 30 of 30 problems are ``Estimate(1.0, 0.865, 1.0)``."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def avg_at_n(results: Sequence[Sequence[bool]]) -> Estimate:
    """The share of correct samples. results: one non-empty row of verdicts per problem."""
    return over_problems([sum(row) / len(row) for row in results])


def pass_at_k(results: Sequence[Sequence[bool]], k: int) -> Estimate:
    """The chance that at least one of k samples is correct.

    results: one row of n ≥ k verdicts per problem. Unbiased: 1 - C(n - c, k) / C(n, k), with c correct ones of n (Chen
    et al., arXiv 2107.03374, Eq. 1), averaged over problems.
    """
    return over_problems([1.0 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in results])


def maj_at_k(results: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]], k: int) -> Estimate:
    """The chance that the most frequent answer of k samples is correct (Wang et al., arXiv 2203.11171).

    Correct samples vote for one answer, wrong ones for the answer that they give; a sample without an answer does not
    vote. If t answers tie, one of them is drawn: a correct one among them counts 1/t. Without a vote the result is
    wrong. Exact, as the average over all C(n, k) choices of k samples.

    results, answers: one row of n ≥ k verdicts, and of answers (None: none), per problem; equal texts are equal
    answers, and those of correct samples are not looked at.
    """
    return over_problems([_majority(row, given, k) for row, given in zip(results, answers, strict=True)])


def over_problems(values: Sequence[float]) -> Estimate:
    """The mean of one number in [0, 1] per problem, at least one problem.

    Samples of one problem are not independent, so the interval is that of a mean over problems. It adds z²/2 problems
    of 0 and z²/2 of 1 to the given ones: for numbers that are all 0 or 1 this is the interval of Agresti and Coull (The
    American Statistician 52, 1998), which contains Wilson's. Unlike the plain normal interval it has a width where all
    problems are equal, and for a single one.
    """
    added, mean = Z_95**2, math.fsum(values) / len(values)
    count = len(values) + added
    center = (math.fsum(values) + added / 2) / count
    variance = max((math.fsum(value * value for value in values) + added / 2) / count - center**2, 0.0)
    half_width = Z_95 * math.sqrt(variance / count)
    return Estimate(mean, max(center - half_width, 0.0), min(center + half_width, 1.0))


def _majority(row: Sequence[bool], answers: Sequence[str | None], k: int) -> float:
    """maj@k of one problem: choices of k samples in which the correct answer wins, over all choices."""
    num_correct = sum(row)
    wrong = Counter(answer for is_correct, answer in zip(row, answers) if not is_correct and answer is not None)
    num_silent = len(row) - num_correct - wrong.total()
    won = 0.0
    for votes in range(1, min(num_correct, k) + 1):
        chosen = math.comb(num_correct, votes)
        for (others, num_tied), ways in _beaten(wrong, votes, k - votes).items():
            won += chosen * ways * math.comb(num_silent, k - votes - others) / (num_tied + 1)
    return won / math.comb(len(row), k)


def _beaten(wrong: Counter[str], votes: int, most: int) -> dict[tuple[int, int], int]:
    """(wrong samples, answers with as many votes as the correct one) → choices in which no answer has more.

    wrong: samples by answer. votes: of the correct answer. most: wrong samples at the most.
    """
    choices: dict[tuple[int, int], int] = {(0, 0): 1}
    for size in wrong.values():
        longer: dict[tuple[int, int], int] = defaultdict(int)
        for (others, num_tied), ways in choices.items():
            for count in range(min(size, votes, most - others) + 1):
                longer[others + count, num_tied + (count == votes)] += ways * math.comb(size, count)
        choices = longer
    return choices
