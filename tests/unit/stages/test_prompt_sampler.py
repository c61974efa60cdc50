"""Which groups dynamic sampling keeps."""

from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.prompt_sampler import unequal_groups


def test_only_groups_with_different_rewards_teach() -> None:
    def sample(name: str, index: int, reward: float) -> Rollout:
        return Rollout(Prompt(name, (1,), "", "", "t"), index, 0, (2,), "", (-1.0,), "stop", 0, reward)

    rollouts = [sample("a", 0, 1.0), sample("b", 0, 1.0), sample("a", 1, 1.0), sample("b", 1, -1.0)]
    assert [(r.prompt.prompt_id, r.sample_index) for r in unequal_groups(rollouts)] == [("b", 0), ("b", 1)]
    assert unequal_groups([]) == []
