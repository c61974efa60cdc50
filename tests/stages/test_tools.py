"""PPO on responses in which a tool writes, with SAO's critic: what is stored, learned, reported and resumed."""

from pathlib import Path

import pytest
import torch

from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from megatron_vcppo.tasks.word_tokenizer import WORDS
from tests.helpers.checkpoints import stored_tensors
from tests.helpers.rollout_stages import Stage, make_config
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node

TOOL = """
class Tool:
    stop = "1"  # of an untrained model every sixth word has it

    def __call__(self, prompt, text):
        return "back 3"

tool = Tool()
"""


def critic_of(stage: Stage, iteration: int) -> dict[str, torch.Tensor]:
    """Its tensors in a checkpoint."""
    folder = stage.folder / "checkpoints" / f"iter_{iteration:07d}" / "critic"
    return stored_tensors(folder)


@pytest.mark.slow
def test_a_tool_writes_within_responses_and_only_the_policys_tokens_are_learned(
    node: RolloutNode, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_tool.py").write_text(TOOL)
    monkeypatch.syspath_prepend(str(tmp_path))
    ppo = {
        "iterations": 3,
        "critic_only_iterations": 1,
        "evaluate_every": 0,
        "checkpoint": {"save_every": 1, "keep_last": 0},
        "loss": {"kind": "dis", "clip_low": 0.8, "clip_high": 3.0},
        "critic": {"init": "value_pretrain", "frozen": ["*.self_attn.*"], "updates_per_actor_update": 2},
    }
    prompts = {"tools": {"running_sum": "own_tool:tool"}, "max_tool_calls": 2}
    config = make_config(task, tmp_path / "run", {"ppo": ppo, "prompts": prompts, "value_pretrain": {"steps": 1}})
    pretraining, stage = (Stage(node, config, name) for name in ("value_pretrain", "ppo"))
    assert set(pretraining.run()) == {0} and set(stage.run()) == {0}
    assert any(rollout.observations for rollout in read_rollouts(pretraining.folder / "rollouts", 1))
    records = read_metrics(stage.folder)
    for iteration, record in enumerate(records, 1):
        rollouts = read_rollouts(stage.folder / "rollouts", iteration)
        for rollout in rollouts:
            words = [WORDS[token] for token in rollout.response_ids]
            calls = [t + 1 for t, word in enumerate(words) if "1" in word][:2]
            spans = tuple((start, min(start + 2, 24)) for start in calls if start < 24)
            assert rollout.observations == spans and len(words) <= 24
            assert all(words[start:end] == ["back", "3"][: end - start] for start, end in spans)
        total, observed = (sum(x) for x in zip(*((len(r.response_ids), r.num_observed) for r in rollouts), strict=True))
        assert observed and record["rollout/tokens"] == total
        assert record["rollout/observed_share"] == pytest.approx(observed / total)
        assert 0 <= record.get("actor/dis_masked_low", 0.0) < 1 and "time/logprobs_s" not in record
    assert "actor/loss" not in records[0] and all("actor/dis_masked_high" in record for record in records[1:])

    first, last = (critic_of(stage, iteration) for iteration in (1, 3))
    weights = [key for key in first if not key.startswith("optimizer.")]
    frozen = {key for key in weights if torch.equal(first[key], last[key])}
    assert frozen == {key for key in weights if ".self_attention." in key and "layer_norm_weight" not in key}
    assert not any(f"optimizer.state.exp_avg.{key}" in last for key in frozen)

    again = stage.replay(node, tmp_path / "again")
    assert again.checkpoint() == stage.checkpoint(), "stored spans are what was trained on"
    assert read_manifest(again.folder)["meta"]["checkpoint"].endswith("iter_0000003")
