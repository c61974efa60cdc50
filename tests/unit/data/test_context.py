"""Shares of a packed micro-batch for context-parallel ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import pack, rank_order, rounding
from megatron_vcppo.records import TrainSequence


def test_example_of_the_docstring() -> None:
    assert rank_order(torch.tensor([0, 4, 12]), 2).tolist() == [0, 3, 4, 5, 10, 11, 1, 2, 6, 7, 8, 9]


def test_the_layout_is_transformer_engines() -> None:
    """What its thd_get_partitioned_indices gives for two segments of 8 tokens on two ranks."""
    first, second = rank_order(torch.tensor([0, 8, 16], dtype=torch.int32), 2).view(2, -1).tolist()
    assert first == [0, 1, 6, 7, 8, 9, 14, 15]
    assert second == [2, 3, 4, 5, 10, 11, 12, 13]


@given(
    st.lists(st.integers(1, 50), max_size=8),
    st.integers(2, 5),
    st.sampled_from([1, 2, 3, 4]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_ranks_share_every_token_once_and_all_work_alike(lengths: list[int], cp: int, tp: int, split: bool) -> None:
    multiple, segment_multiple = rounding(ParallelConfig(cp=cp, tp=tp, sequence_parallel=split))
    packed = pack([TrainSequence((1,) * n) for n in lengths], range(len(lengths)), multiple, segment_multiple)
    order = rank_order(packed.cu_seqlens, cp)
    assert order.sort().values.tolist() == list(range(packed.num_tokens))
    shares = order.view(cp, -1)
    assert not split or shares.shape[1] % tp == 0
    assert all((share.diff() > 0).all() for share in shares)
    # A token at position p attends to p + 1 tokens.
    work = {int((packed.position_ids[share] + 1).sum()) for share in shares}
    assert len(work) == 1


def test_one_rank_needs_no_padding() -> None:
    assert rounding(ParallelConfig()) == (1, 1) and rounding(ParallelConfig(tp=4)) == (1, 1)
    assert rounding(ParallelConfig(tp=4, sequence_parallel=True)) == (4, 1)
    assert rounding(ParallelConfig(tp=4, cp=2)) == (4, 4)
    assert rounding(ParallelConfig(tp=4, cp=2, sequence_parallel=True)) == (8, 4)
    assert rounding(ParallelConfig(tp=3, cp=2, sequence_parallel=True)) == (12, 4)


@pytest.mark.parametrize(("recipe", "multiple"), [("delayed", 16), ("current", 16), ("blockwise", 128)])
def test_with_fp8_each_ranks_part_of_the_tokens_is_a_multiple(recipe: Any, multiple: int) -> None:
    model = ModelConfig(hf="", fp8="hybrid", fp8_recipe=recipe)
    assert rounding(ParallelConfig(tp=4), model) == (multiple, 1)
    assert rounding(ParallelConfig(tp=4, sequence_parallel=True), model) == (4 * multiple, 1)
    assert rounding(ParallelConfig(tp=4, cp=2), model) == (2 * multiple, 4)
    assert rounding(ParallelConfig(tp=3, cp=2, sequence_parallel=True), model) == (6 * multiple, 4)
    assert rounding(ParallelConfig(), ModelConfig(hf="", fp8_recipe=recipe)) == (1, 1)


def test_segments_that_cannot_be_cut_are_bugs() -> None:
    with pytest.raises(AssertionError, match=r"segments of \[4, 6\] tokens on 2"):
        rank_order(torch.tensor([0, 4, 10]), 2)
