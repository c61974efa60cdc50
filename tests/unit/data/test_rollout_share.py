"""Rollouts as flat arrays, their blocks, and back through packed micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import unpack_each
from megatron_vcppo.data.rollout_share import ExpertsFormat, RolloutShare, RoutedExperts
from megatron_vcppo.records import Prompt, Rollout


def make_rollout(
    name: str, prompt: tuple[int, ...], response: tuple[int, ...], reward: float | None = 1.0, verdict: str = ""
) -> Rollout:
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(response)))
    reason = "length" if len(response) > 3 else "stop"
    return Rollout(Prompt(name, prompt, "", "", "t"), 0, 0, response, "", logprobs, reason, 0, reward, verdict)


ROLLOUTS = [
    make_rollout("a", (1, 2, 3), (7, 8, 2)),
    make_rollout("b", (4,), (9, 2), -1.0, "timeout: 10 s"),
    make_rollout("a", (1, 2, 3), (5, 5, 5, 5), -1.0, "wrong: 5"),
]


def test_a_share_of_all_rollouts() -> None:
    share = RolloutShare.whole(ROLLOUTS)
    batch = share.batch
    assert batch.lengths.tolist() == [3, 2, 4] and batch.rewards.tolist() == [1.0, -1.0, -1.0]
    assert batch.sequence_lengths.tolist() == [6, 3, 7] and batch.is_correct.tolist() == [True, False, False]
    assert batch.truncated.tolist() == [False, False, True] and batch.num_verdicts("timeout") == 1
    assert batch.group_ids[0] == batch.group_ids[2] != batch.group_ids[1] and batch.num_verdicts("error") == 0
    assert share.token_ids.tolist() == [1, 2, 3, 7, 8, 2, 4, 9, 2, 1, 2, 3, 5, 5, 5, 5]
    assert share.response_ids.tolist() == [7, 8, 2, 9, 2, 5, 5, 5, 5] and share.num_tokens == 9
    assert torch.equal(share.rollout_logprobs[3:5], torch.tensor([-0.1, -0.2]))
    assert share.per_token(torch.tensor([1, 2, 3])).tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("num_tokens", "shapes"), [(100, [(3, 4)]), (6, [(2, 3), (1, 4)]), (1, [(1, 3), (1, 2), (1, 4)])]
)
def test_blocks_are_bounded_and_cover_every_token_once(num_tokens: int, shapes: list[tuple[int, int]]) -> None:
    share, flat = RolloutShare.whole(ROLLOUTS), torch.arange(9.0) + 1
    blocks = list(share.blocks(num_tokens))
    assert [tuple(block.mask.shape) for block in blocks] == shapes
    assert torch.equal(torch.cat([block.pad(flat)[block.mask] for block in blocks]), flat)
    assert all(float(block.pad(flat)[~block.mask].sum()) == 0 for block in blocks)
    assert torch.equal(torch.cat([share.table.lengths[block.rows] for block in blocks]), share.table.lengths)


def test_a_share_without_rollouts_has_one_empty_block() -> None:
    whole = RolloutShare.whole(ROLLOUTS)
    empty = RolloutShare(whole.batch, whole.replicas, whole.rows[:0], whole.token_ids[:0], whole.rollout_logprobs[:0],
                         whole.sampled[:0])  # fmt: skip
    (block,) = empty.blocks()
    assert block.mask.shape == (0, 1) and empty.sequences({}) == [] and empty.flatten([]).shape == (0,)


def test_unscored_and_empty_rollouts_are_refused() -> None:
    with pytest.raises(AssertionError, match="of b was not scored"):
        RolloutShare.whole([make_rollout("b", (1,), (2,), None)])
    with pytest.raises(AssertionError, match="of b is empty"):
        RolloutShare.whole([make_rollout("b", (1,), ())])


def test_any_other_response_has_another_digest() -> None:
    digests = {int(row["digest"]) for row in RolloutShare.whole(ROLLOUTS).batch.rows}
    other = make_rollout("a", (1, 2, 3), (7, 8, 3))
    assert len(digests) == 3 and int(RolloutShare.whole([other]).batch.rows["digest"][0]) not in digests


@pytest.mark.parametrize("multiple", [1, 4])
def test_fields_come_back_from_packed_microbatches(multiple: int) -> None:
    """What is packed at a response token comes back at that token."""
    share, field = RolloutShare.whole(ROLLOUTS), torch.arange(9.0) + 1
    microbatches = Packer(9, multiple, 0, 1).pack(share.sequences({"x": field}), {"x": float})
    assert len(microbatches) > 1 and all(m.num_tokens % multiple == 0 for m in microbatches)
    assert torch.equal(share.flatten(unpack_each(microbatches, [m.fields["x"] for m in microbatches])), field)


def test_fields_are_zero_on_the_prompt_and_the_order_is_free() -> None:
    share = RolloutShare.whole(ROLLOUTS)
    mask = torch.ones(9, dtype=torch.bool)
    last, second = share.sequences({"x": torch.arange(9.0), "response_mask": mask}, [2, 1])
    assert second.token_ids.tolist() == [4, 9, 2] and last.token_ids.tolist() == [1, 2, 3, 5, 5, 5, 5]
    assert second.fields["x"].tolist() == [0.0, 3.0, 4.0]
    assert second.fields["response_mask"].tolist() == [False, True, True]


def test_tokens_of_a_tool_are_known_by_rollout_and_by_token() -> None:
    tool = [
        replace(ROLLOUTS[0], observations=((1, 2),)),
        ROLLOUTS[1],
        replace(ROLLOUTS[2], observations=((0, 1), (2, 4))),
    ]
    share = RolloutShare.whole(tool)
    assert share.batch.lengths.tolist() == [3, 2, 4] and share.batch.sampled_lengths.tolist() == [2, 2, 1]
    assert share.sampled.tolist() == [True, False, True, True, True, False, True, False, False]
    first, *_ = share.blocks(1)
    assert first.mask.tolist() == [[True] * 3] and first.sampled.tolist() == [[True, False, True]]
    before, after = (RolloutShare.whole(rollouts).batch for rollouts in (ROLLOUTS, tool))
    assert after.has_observations and not before.has_observations
    assert (before.rows["digest"] != after.rows["digest"]).tolist() == [True, False, True]
    with pytest.raises(AssertionError, match="of b is a tool's alone"):
        RolloutShare.whole([replace(ROLLOUTS[1], observations=((0, 2),))])


@pytest.mark.parametrize("form", [ExpertsFormat(3, 2, 1), ExpertsFormat(3, 2, 2)], ids=["bytes", "words"])
def test_experts_reach_the_micro_batch_at_their_tokens(form: ExpertsFormat) -> None:
    """The last token has none; nor have tokens that a tool wrote at the end of a response."""
    generator, rollouts, numbers = np.random.default_rng(0), [], []
    for rollout, missing in zip(ROLLOUTS, (1, 1, 2), strict=True):
        length = len(rollout.prompt.token_ids) + len(rollout.response_ids) - missing
        chosen = generator.integers(0, 200, (length, 3, 2)).astype(np.uint8 if form.num_bytes == 1 else np.int16)
        numbers.append(chosen)
        rollouts.append(replace(rollout, routed_experts=chosen.tobytes()))
    share = replace(RolloutShare.whole(rollouts), routed_experts=RoutedExperts.of(rollouts, form))
    assert all(sequence.routed_experts is None for sequence in share.sequences({}))
    (microbatch,) = Packer(64, 1, 0, 1).pack(share.sequences({}, order=[2, 0, 1], with_experts=True))
    assert microbatch.routed_experts is not None and microbatch.routed_experts.shape == (16, 3, 2)
    start = 0
    for index in (2, 0, 1):
        part = microbatch.routed_experts[start : start + len(numbers[index])].numpy()
        np.testing.assert_array_equal(part, numbers[index])
        start += int(share.batch.sequence_lengths[index])
    assert microbatch.routed_experts[5].tolist() == [[0, 1]] * 3, "any experts, but different ones"
    digests = [RolloutShare.whole(every).batch.rows["digest"].tolist() for every in (ROLLOUTS, rollouts)]
    assert all(a != b for a, b in zip(*digests, strict=True))
