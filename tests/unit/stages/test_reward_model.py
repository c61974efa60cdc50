"""What the reward model is trained on: labels, truncated responses, pairs of right and wrong ones."""

import pytest
import torch

from megatron_vcppo.config import RewardModelConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.reward_model import (
    PairwiseLoss,
    label_responses,
    make_step,
    training_units,
    units_per_step,
)


def rollouts(num_right: int, num_wrong: int, length: int = 6) -> list[Rollout]:
    """Response tokens name the rollout: 100 + number."""
    rewards = [1.0] * num_right + [-1.0] * num_wrong
    prompt = Prompt("p", (1, 2), "", "", "t")
    return [Rollout(prompt, i, 0, (100 + i,) * length, "", (), "stop", 0, reward) for i, reward in enumerate(rewards)]


def test_the_score_is_read_behind_the_last_token() -> None:
    (sequence, good), (_, bad) = label_responses(rollouts(1, 1), RewardModelConfig(), run_seed=0)
    assert good and not bad
    (microbatch,), _ = make_step([(sequence,)], Packer(64, 1, 0, 1), RewardModelConfig())
    place = int(microbatch.fields["last_mask"].nonzero())
    assert place == 7 and int(microbatch.token_ids[place]) == 100 and float(microbatch.fields["label"][place]) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_is_truncated_and_labeled_wrong(share: float) -> None:
    examples = label_responses(rollouts(4000, 0), RewardModelConfig(truncated_share=share), run_seed=1)
    truncated = [len(sequence) < 9 for sequence, _ in examples]
    assert sum(truncated) / 4000 == pytest.approx(share, abs=0.02)
    assert [good for _, good in examples] == [not one for one in truncated]
    assert {len(sequence) - 3 for sequence, _ in examples} == set(range(1, 6) if share == 1 else range(1, 7)) - (
        set(range(1, 6)) if share == 0 else set()
    )


def test_every_response_is_in_a_pair_and_no_step_is_without_one() -> None:
    settings = RewardModelConfig(loss="pairwise", batch_size=6)
    pairs = training_units(label_responses(rollouts(3, 17), settings, run_seed=0), settings)
    assert len(pairs) == 17 and units_per_step(settings) == 3
    kinds = [tuple(sequence.fields["label"][-1] for sequence in pair) for pair in pairs]
    assert set(kinds) == {(1.0, 0.0)}
    assert len({pair[0].token_ids for pair in pairs}) == 3 and len({pair[1].token_ids for pair in pairs}) == 17
    with pytest.raises(UserError, match="needs right and wrong ones"):
        training_units(label_responses(rollouts(0, 5), settings, run_seed=0), settings)


def test_pairs_stay_together_on_every_replica() -> None:
    """Scores of 1 for the right and 0 for the wrong responses; the shares of two replicas add up."""
    settings = RewardModelConfig(loss="pairwise", batch_size=8)
    pairs = training_units(label_responses(rollouts(4, 4), settings, run_seed=0), settings)
    total = torch.tensor(0.0)
    for rank in range(2):
        microbatches, loss = make_step(pairs, Packer(20, 1, rank, 2), settings)
        assert isinstance(loss, PairwiseLoss) and loss.denominator == 4
        for microbatch in microbatches:
            share, metrics = loss(microbatch.fields["label"], microbatch)
            total = total + share
            assert float(metrics["accuracy"][0] / metrics["accuracy"][1]) == 1.0
    assert float(total) == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-1.0))))
