"""pass@k against all subsets, avg@k, and their intervals."""

import itertools
import math
import random

import pytest

from megatron_vcppo.algo.pass_at_k import avg_at_k, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    chance = random.Random(k)
    results = [[chance.random() < share for _ in range(7)] for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]
    shares = []
    for row in results:
        subsets = list(itertools.combinations(row, k))
        shares.append(sum(any(subset) for subset in subsets) / len(subsets))
    assert pass_at_k(results, k)[0] == pytest.approx(sum(shares) / len(shares))


def test_pass_at_1_is_the_average() -> None:
    results = [[True, False, False, False], [True, True, True, False]]
    assert pass_at_k(results, 1) == pytest.approx(avg_at_k(results)) and avg_at_k(results)[0] == 0.5


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 problems with chances uniform in 0 … 1: the truth is 1/2."""
    chance = random.Random(0)
    covered = 0
    for _ in range(400):
        results = [[chance.random() < p for _ in range(4)] for p in (chance.random() for _ in range(300))]
        mean, half_width = avg_at_k(results)
        covered += abs(mean - 0.5) <= half_width
    assert 0.91 <= covered / 400 <= 0.98


def test_one_problem_has_no_interval() -> None:
    assert pass_at_k([[True, False]], 2) == (1.0, math.inf)
