"""Rollouts to tensors and back through packed micro-batches."""

import pytest
import torch

from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import unpack_all
from megatron_vcppo.data.rollout_batch import make_batch
from megatron_vcppo.records import Prompt, Rollout


def make_rollout(name: str, prompt: tuple[int, ...], response: tuple[int, ...], reward: float | None = 1.0) -> Rollout:
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(response)))
    reason = "length" if len(response) > 3 else "stop"
    return Rollout(Prompt(name, prompt, "", "", "t"), 0, 0, response, "", logprobs, reason, 0, reward)


ROLLOUTS = [
    make_rollout("a", (1, 2, 3), (7, 8, 2)),
    make_rollout("b", (4,), (9, 2), -1.0),
    make_rollout("a", (1, 2, 3), (5, 5, 5, 5), -1.0),
]


def test_tensors_of_rollouts() -> None:
    batch = make_batch(ROLLOUTS)
    assert batch.response_mask.tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4]
    assert batch.lengths.tolist() == [3, 2, 4] and batch.rewards.tolist() == [1.0, -1.0, -1.0]
    assert batch.sequence_lengths == [6, 3, 7] and batch.is_correct.tolist() == [True, False, False]
    assert batch.group_ids.tolist() == [0, 1, 0] and batch.truncated.tolist() == [False, False, True]
    assert torch.equal(batch.rollout_logprobs[1], torch.tensor([-0.1, -0.2, 0.0, 0.0]))


def test_unscored_and_empty_rollouts_are_refused() -> None:
    with pytest.raises(AssertionError, match="of b was not scored"):
        make_batch([make_rollout("b", (1,), (2,), None)])
    with pytest.raises(AssertionError, match="of b is empty"):
        make_batch([make_rollout("b", (1,), ())])


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_fields_come_back_from_packed_microbatches(dp_size: int, multiple: int) -> None:
    """What is packed at a response token comes back at that token, each row from exactly one replica."""
    batch = make_batch(ROLLOUTS)
    field = torch.arange(12.0).view(3, 4) + 1
    total = torch.zeros(3, 4)
    for dp_rank in range(dp_size):
        packer = Packer(9, multiple, dp_rank, dp_size)
        shard = packer.shard(batch.sequence_lengths)
        microbatches = packer.pack(batch.sequences(shard, {"x": field}), {"x": float})
        assert microbatches and all(m.num_tokens % multiple == 0 for m in microbatches)
        rows = unpack_all(microbatches, [m.fields["x"] for m in microbatches])
        total += batch.to_rows(rows, shard)
    assert torch.equal(total, field.masked_fill(~batch.response_mask, 0.0))


def test_fields_are_zero_on_the_prompt() -> None:
    batch = make_batch(ROLLOUTS)
    sequence = batch.sequences([1], {"x": torch.full((3, 4), 5.0), "response_mask": batch.response_mask})[0]
    assert sequence.token_ids == (4, 9, 2)
    assert sequence.fields["x"].tolist() == [0.0, 5.0, 5.0]
    assert sequence.fields["response_mask"].tolist() == [False, True, True]
