"""``bench.py rollout_plane``: what a rank sends and gets is that of its share, however many ranks there are."""

import argparse

from tools.benchmarks.rollout_plane import add_arguments, run


def test_bytes_do_not_grow_with_the_ranks_of_a_replica() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sizes = "--rollouts 64 --tokens 256 --samples 2 --minibatches 2 --dp 4 --ranks 8 32"
    leader, other, leader_of_8, other_of_8 = run(parser.parse_args(sizes.split()))
    assert [case["role"] for case in (leader, other, leader_of_8, other_of_8)] == ["leader", "other"] * 2
    assert leader["tokens"] == other_of_8["tokens"] > 64 * 100
    assert leader["received_mb"] == leader_of_8["received_mb"] > 0 and other["received_mb"] == other_of_8["received_mb"]
    assert leader_of_8["sent_mb"] >= leader["sent_mb"] > 0
    assert leader["imbalance_worst"] <= 1.1 and 0 <= leader["padding_share"] <= 0.05
