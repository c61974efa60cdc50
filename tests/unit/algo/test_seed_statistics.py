"""Statistics over seeds, against values computed by hand."""

import math

import pytest

from megatron_vcppo.algo.seed_statistics import (
    Interval,
    all_of,
    correlation,
    interval_of,
    judge,
    mean_over,
    paired_differences,
    t_95,
)


def test_mean_and_standard_error():
    # 1, 2, 3: variance 1, error 1/√3.
    mean = mean_over([1.0, 2.0, 3.0])
    assert mean.value == 2.0 and mean.count == 3
    assert mean.error == pytest.approx(0.57735, abs=1e-5)
    assert mean.half_width == pytest.approx(4.303 * 0.57735, abs=1e-4)
    one = mean_over([5.0])
    assert (one.value, one.error, one.half_width) == (5.0, None, None)


def test_students_t():
    assert (t_95(1), t_95(2), t_95(30), t_95(1000)) == (12.706, 4.303, 2.042, 2.042)


def test_differences_pair_the_seeds_that_both_have():
    assert paired_differences({0: 0.8, 1: 0.9, 2: 0.7}, {1: 0.5, 0: 0.1, 7: 0.0}) == pytest.approx({0: 0.7, 1: 0.4})


def test_pairing_removes_what_seeds_share():
    """The seeds differ by 10, the arms by 1 in every seed."""
    ours, theirs = {0: 1.0, 1: 11.0, 2: 21.0}, {0: 0.0, 1: 10.0, 2: 20.0}
    assert mean_over([*paired_differences(ours, theirs).values()]).error == 0
    assert mean_over([*ours.values()]).error == pytest.approx(10 / math.sqrt(3))


def test_correlation_and_its_interval():
    # dx = -1.5 -.5 .5 1.5, dy = -1 -1 0 2: Σ dx dy = 1.5 + .5 + 0 + 3 = 5, √(5 · 6) = 5.477.
    found = correlation([1, 2, 3, 4], [1, 1, 2, 4])
    assert found is not None and found.value == pytest.approx(5 / math.sqrt(30))
    z = 0.5 * math.log((1 + found.value) / (1 - found.value))
    assert math.atanh(found.low) == pytest.approx(z - 1.959964) and math.atanh(found.high) == pytest.approx(
        z + 1.959964
    )
    assert correlation([1, 2, 3], [1, 2, 3]) is None and correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_a_perfect_correlation_has_a_finite_interval():
    found = correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert found is not None and found.low > 0.99 and found.high <= 1.0


@pytest.mark.parametrize(
    ("interval", "above", "verdict"),
    [
        (Interval(0.5, 0.1, 0.9), 0.0, "supported"),
        (Interval(0.5, 0.1, 0.9), 0.2, "not supported"),
        (Interval(0.5, -0.1, 1.1), 0.0, "not supported"),
        (Interval(-0.5, -0.9, -0.1), 0.0, "contrary"),
        (Interval(-0.05, -0.08, -0.02), -0.1, "supported"),
        (None, 0.0, "not judged"),
    ],
)
def test_a_verdict_follows_from_the_interval(interval, above, verdict):
    assert judge(interval, above) == verdict


def test_three_seeds_judge_by_students_t():
    # 0.6, 0.7, 0.8: mean 0.7, error 0.0577, half width 0.248.
    found = interval_of(mean_over([0.6, 0.7, 0.8]))
    assert found is not None and (found.low, found.high) == pytest.approx((0.4516, 0.9484), abs=1e-3)
    assert judge(found) == "supported" and judge(found, 0.5) == "not supported" and judge(found, 0.95) == "contrary"
    assert interval_of(mean_over([0.7])) is None


def test_several_claims_are_as_good_as_the_weakest():
    assert all_of(["supported", "supported"]) == "supported"
    assert all_of(["supported", "not supported"]) == "not supported"
    assert all_of(["not supported", "contrary", "not judged"]) == "contrary"
