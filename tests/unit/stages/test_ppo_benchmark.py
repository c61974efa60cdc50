"""``bench.py ppo`` reads a run as it is: idle is all that is no work, batches are packed as updates pack them."""

import json
import math

import pytest

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.run.rollout_store import read_rollouts
from tests.helpers.recorded_run import record_run
from tools.benchmarks._long_tail import TAIL, Lengths
from tools.benchmarks.ppo import iteration_case, packing_case


def test_idle_is_all_time_in_which_neither_generation_nor_training_runs(tmp_path):
    record_run(tmp_path / "run", collapsing=False, iterations=3)
    log = tmp_path / "run" / "ppo" / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records[1:]:
        record |= {"time/generation_s": 4.0, "time/update_s": 5.0, "time/sync_s": 0.5, "time/save_s": 0.25}
        record |= {"time/iteration_s": 10.0, "rollout/tokens": 2000.0}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    case = iteration_case(tmp_path / "run")
    assert (case["iterations"], case["iteration_s"], case["idle_share"]) == (2, 10.0, 0.1)
    assert (case["response_tokens_per_s"], case["generation_tokens_per_s"]) == (200.0, 500.0)


@pytest.mark.parametrize("dp_size, tp_size", [(1, 1), (2, 1), (2, 8), (4, 8)])
def test_packing_counts_every_token_of_every_replica_once(tmp_path, dp_size, tp_size):
    config = record_run(tmp_path / "run", collapsing=False, iterations=2)
    config.ppo.minibatches = 3
    parallel = ParallelConfig(tp=tp_size, sequence_parallel=tp_size > 1, tokens_per_microbatch=512)
    case = packing_case(tmp_path / "run", config, parallel, dp_size)
    lengths = [
        len(rollout.prompt.token_ids) + len(rollout.response_ids)
        for iteration in (1, 2)
        for rollout in read_rollouts(tmp_path / "run" / "ppo" / "rollouts", iteration)
    ]
    padding = case["tokens"] - sum(lengths)
    assert case["minibatches"] == 2 * 3 and case["microbatches"] >= 6 * dp_size
    assert case["padding_share"] == pytest.approx(padding / case["tokens"], abs=1e-5)
    assert 0 <= padding < tp_size * case["microbatches"] and (padding > 0) == (tp_size > 1)
    assert 1 <= case["dp_imbalance"] <= case["dp_imbalance_worst"] and (case["dp_imbalance"] == 1) == (dp_size == 1)


def test_one_response_in_a_hundred_is_ten_times_as_long():
    lengths = [Lengths(mean=80, share=0.01, pinned=False).of(seed) for seed in range(20_000)]
    assert lengths == [Lengths(mean=80, share=0.01, pinned=True).of(seed) for seed in range(20_000)]
    long = [length for length in lengths if length > 120]
    assert set(long) == {80 * TAIL} and len(long) / len(lengths) == pytest.approx(0.01, abs=0.002)
    assert min(lengths) == 40 and sum(lengths) / len(lengths) == pytest.approx(80 * 0.99 + 8, rel=0.02)


def test_responses_that_may_end_at_every_token_have_the_mean_that_is_given():
    lengths = [Lengths(mean=128, share=0.0, pinned=False, longest=384).of(seed) for seed in range(20_000)]
    # An exponential's mean, less what lies beyond three times it.
    assert sum(lengths) / len(lengths) == pytest.approx(128 * (1 - math.exp(-3)), rel=0.02)
    assert (min(lengths), max(lengths)) == (1, 384)
