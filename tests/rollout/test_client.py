"""Which requests the client makes."""

from megatron_vcppo.config.rollout import RolloutConfig
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.client import RolloutClient


def make_rollout(index: int, reward: float | None = None) -> Rollout:
    prompt = Prompt(f"chain/{index}", (1, 12, 40), "3 + 4 ?", "7", "running_sum")
    return Rollout(prompt, index, 5, (9, 8, index), f"first line\nseven ½ {index}", (-0.5, -1.25, -1e-7), "stop", 3,
                   reward, "wrong" if reward == 0 else "correct")  # fmt: skip


def test_responses_that_are_known_are_not_requested_again(tmp_path) -> None:
    client = RolloutClient(tmp_path, RolloutConfig(), 64, run_seed=7, decode=str)
    prompts = [make_rollout(i).prompt for i in range(2)]
    everything = client.plan(prompts, 1, 2)
    known = {(item.prompt.prompt_id, item.sample_index, item.request.seed) for item in everything[:3]}
    (left,) = client.plan(prompts, 1, 2, known)
    assert (left.prompt, left.sample_index) == (prompts[1], 1) and left.request.seed == everything[3].request.seed
    assert len(client.plan(prompts, 2, 2, known)) == 4, "another iteration has other seeds"
