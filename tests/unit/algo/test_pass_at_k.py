"""avg@n, pass@k and maj@k against all subsets, and their intervals against published values and simulations."""

import itertools
import random
from collections import Counter

import pytest

from megatron_vcppo.algo.pass_at_k import avg_at_n, maj_at_k, over_problems, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    chance = random.Random(k)
    results = [[chance.random() < share for _ in range(7)] for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]
    shares = []
    for row in results:
        subsets = list(itertools.combinations(row, k))
        shares.append(sum(any(subset) for subset in subsets) / len(subsets))
    assert pass_at_k(results, k).value == pytest.approx(sum(shares) / len(shares))


def test_pass_at_1_is_the_average() -> None:
    results = [[True, False, False, False], [True, True, True, False]]
    assert pass_at_k(results, 1) == avg_at_n(results) and avg_at_n(results).value == 0.5


def vote(answers: tuple[str | None, ...]) -> float:
    """The chance that "right" is drawn from the most frequent answers."""
    counts = Counter(answer for answer in answers if answer is not None).most_common()
    winners = [answer for answer, count in counts if count == counts[0][1]]
    return winners.count("right") / len(winners) if winners else 0.0


@pytest.mark.parametrize("k", range(1, 9))
def test_maj_at_k_is_the_vote_over_all_subsets(k: int) -> None:
    chance = random.Random(k)
    for _ in range(30):
        answers = chance.choices(["right", "right", "a", "a", "b", "c", None], k=8)
        subsets = list(itertools.combinations(answers, k))
        expected = sum(map(vote, subsets)) / len(subsets)
        right = [answer == "right" for answer in answers]
        assert maj_at_k([right], [answers], k).value == pytest.approx(expected)


def test_right_answers_in_different_words_vote_together() -> None:
    results, answers = [[True, True, False, False, False]], [["1/2", "0.5", "2", "3", None]]
    assert maj_at_k(results, answers, 5).value == 1.0


def test_a_tie_is_drawn_and_silence_is_wrong() -> None:
    assert maj_at_k([[True, False]], [["1", "2"]], 2).value == 0.5
    assert maj_at_k([[True, False]], [["1", None]], 2).value == 1.0
    assert maj_at_k([[False, False]], [[None, None]], 2).value == 0.0


def test_many_samples_take_no_enumeration() -> None:
    row = [i % 3 == 0 for i in range(64)]
    answers = [str(i % 40) for i in range(64)]
    assert 0.99 < maj_at_k([row], [answers], 32).value <= 1.0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # statsmodels 0.15: proportion_confint(right, count, method="agresti_coull")
    [(0, 10, 0.0, 0.320887), (8, 10, 0.479368, 0.954113), (30, 30, 0.865288, 1.0), (123, 500, 0.210232, 0.285642)],
)
def test_intervals_of_single_verdicts_are_those_of_agresti_and_coull(
    right: int, count: int, low: float, high: float
) -> None:
    found = avg_at_n([[i < right] for i in range(count)])
    assert (found.value, found.low, found.high) == pytest.approx((right / count, low, high), abs=1e-6)


@pytest.mark.parametrize("num_problems", [30, 300])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_problems: int, num_samples: int) -> None:
    """Problems with chances uniform in 0 … 1: the truth is 1/2."""
    chance = random.Random(0)
    covered = 0
    for _ in range(400):
        chances = [chance.random() for _ in range(num_problems)]
        found = avg_at_n([[chance.random() < p for _ in range(num_samples)] for p in chances])
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.985


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 30, 3000])
def test_equal_problems_still_have_an_interval(value: float, count: int) -> None:
    found = over_problems([value] * count)
    assert found.low <= found.value <= found.high and 0 < found.half_width < 0.5
    assert found.half_width < 0.002 or count < 3000
