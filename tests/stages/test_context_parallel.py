"""Value pretraining and PPO whose trainer ranks share each sequence, with a real engine."""

from pathlib import Path

import pytest

from megatron_vcppo.run.metrics_log import read_metrics
from tests.helpers.rollout_stages import Stage, make_config, make_task
from tools.benchmarks._rollout_node import RolloutNode


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_value_pretraining_and_ppo_with_shared_sequences(tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    layout = {"parallel": {"pp": 1, "cp": 2, "distributed_optimizer": True}}
    steps = {"value_pretrain": {"steps": 2}, "ppo": {"iterations": 3, "evaluate_every": 0}}
    config = make_config(task, tmp_path / "run", {**layout, **steps})
    with RolloutNode(tmp_path / "node", task / "base_model", {"engine": {"max_num_seqs": 8}}) as node:
        node.wait()
        for name, count, first in (
            ("value_pretrain", 2, config.run.seed + 1),
            ("ppo", 3, config.run.seed),
        ):
            stage = Stage(node, config, name)
            assert stage.run() == [0, 0]
            stage.assert_every_prompt_once(8, count, first)
    records = read_metrics(tmp_path / "run" / "ppo")
    # The engine sampled with the weights that were pushed, and its log-probs are those of shared sequences.
    assert all(abs(record["rollout/logprob_gap"]) < 1e-3 for record in records)
    assert all(record["actor/grad_norm"] > 0 and record["critic/grad_norm"] > 0 for record in records)
