"""Thresholds from scores, by hand."""

import pytest

from megatron_vcppo.algo.sign_thresholds import Counts, count, fit_threshold, halves


def test_halves_take_every_other_one():
    assert halves([1, 2, 3, 4, 5]) == ([1, 3, 5], [2, 4]) and halves([1]) == ([1], [])


def test_alarms_are_scores_above_the_threshold():
    assert count([0.5, 0.6, 0.9], [0.1, 0.7], 0.6) == Counts(hits=1, failed=3, false_alarms=1, healthy=2)


@pytest.mark.parametrize(
    ("failed", "healthy", "threshold"),
    [
        ([1.0, 1.2], [0.0, 0.2], 0.6),  # apart: midway
        ([1.0, 0.1], [0.0, 0.5], 0.05),  # 2 hits with a false alarm are as good as 1 without: the lower of the two
        ([1.0, 0.9], [0.0, 0.95], 0.45),
        ([0.3], [0.3], 0.3),
        ([], [0.3], None),
        ([0.3], [], None),
    ],
)
def test_the_threshold_separates_best(failed, healthy, threshold):
    found = fit_threshold(failed, healthy)
    assert found == (None if threshold is None else pytest.approx(threshold))
