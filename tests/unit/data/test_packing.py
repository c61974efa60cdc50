"""Packing: the shift, its inverse, padding, bins and balance."""

import heapq
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.data.packing import balance, pack, pack_all, pack_into_microbatches, unpack_all
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.records import TrainSequence


def make_sequences(lengths: list[int]) -> list[TrainSequence]:
    """Token ids that are all different; "x" equals the token id, "loss_mask" is on for odd ids."""
    ids = itertools.count(1)
    sequences = []
    for length in lengths:
        tokens = tuple(next(ids) for _ in range(length))
        mask = (False, *(t % 2 == 1 for t in tokens[1:]))
        sequences.append(TrainSequence(tokens, {"x": tuple(map(float, tokens)), "loss_mask": mask}))
    return sequences


def test_example_of_the_docstring() -> None:
    sequences = [TrainSequence((5, 6, 7), {"x": (0.0, 1.0, 2.0)}), TrainSequence((8, 9), {"x": (0.0, 3.0)})]
    packed = pack(sequences, [0, 1])
    assert packed.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.labels.tolist() == [6, 7, 0, 9, 0]
    assert packed.fields["x"].tolist() == [1, 2, 0, 3, 0]
    assert packed.max_seqlen == 3 and packed.padding_tokens == 0
    dtypes = (packed.token_ids.dtype, packed.position_ids.dtype, packed.cu_seqlens.dtype, packed.labels.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int32, torch.int64)
    assert [row.tolist() for row in packed.unpack(torch.tensor([1.0, 2, 9, 3, 9]))] == [[0, 1, 2], [0, 3]]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(8, 64),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 4), (8, 4), (16, 2)]),
)
@settings(max_examples=60, deadline=None)
def test_fields_line_up_with_labels_and_come_back(lengths: list[int], budget: int, rounding: tuple[int, int]) -> None:
    multiple, segment_multiple = rounding
    sequences = make_sequences(lengths)
    microbatches = pack_all(sequences, budget, multiple, segment_multiple)
    assert sorted(i for m in microbatches for i in m.sequence_index) == list(range(len(lengths)))
    for packed in microbatches:
        assert packed.num_tokens % multiple == 0
        assert all(span % segment_multiple == 0 for span in packed.cu_seqlens.diff().tolist())
        assert packed.cu_seqlens[-1] == packed.num_tokens == sum(packed.lengths) + packed.padding_tokens
        # x repeats the token id, so after the shift it must repeat the label; where there is no label it is 0.
        assert torch.equal(packed.fields["x"], packed.labels.float())
        assert torch.equal(packed.fields["loss_mask"], packed.labels % 2 == 1)
        for start, end in itertools.pairwise(packed.cu_seqlens.tolist()):
            assert packed.position_ids[start:end].tolist() == list(range(end - start))
            assert packed.labels[end - 1] == 0
    rows = unpack_all(microbatches, [m.labels.float() for m in microbatches])
    assert [row.tolist() for row in rows] == [[0.0, *sequence.fields["x"][1:]] for sequence in sequences]


def test_padding_share_of_normal_batches_is_small() -> None:
    lengths = np.random.default_rng(0).integers(60, 200, 128).tolist()
    microbatches = pack_all(make_sequences(lengths), 4096, multiple=8)
    padding = sum(m.padding_tokens for m in microbatches)
    assert padding <= 0.03 * sum(lengths)
    assert len(microbatches) <= ceil_div(sum(lengths), 4096) + 1


def test_a_rank_without_sequences_gets_a_dummy() -> None:
    packed = pack([], [], multiple=4, empty_fields={"loss_mask": bool, "advantages": float})
    assert packed.num_tokens == packed.padding_tokens == 4 and packed.cu_seqlens.tolist() == [0, 4]
    assert not packed.fields["loss_mask"].any() and packed.fields["advantages"].dtype == torch.float32
    assert packed.unpack(torch.ones(4)) == []


def test_wrong_fields_are_bugs() -> None:
    with pytest.raises(AssertionError, match="nothing predicts the first token"):
        pack([TrainSequence((1, 2), {"loss_mask": (True, True)})], [0])
    with pytest.raises(AssertionError, match="in one micro-batch"):
        pack([TrainSequence((1, 2), {"x": (1.0, 1.0)}), TrainSequence((1, 2), {"y": (1.0, 1.0)})], [0, 1])
    with pytest.raises(AssertionError, match="1 values for 2 tokens"):
        pack([TrainSequence((1, 2), {"x": (1.0,)})], [0])


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(50, 250))
@settings(max_examples=100, deadline=None)
def test_bins_hold_the_budget_and_each_sequence_once(lengths: list[int], budget: int) -> None:
    bins = pack_into_microbatches(lengths, budget)
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    for indices in bins:
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= budget
    assert bins == pack_into_microbatches(lengths, budget)
    # The bound of best-fit decreasing (Dósa 2007), with the sum as a lower bound of the optimum for full-size items.
    if lengths and max(lengths) <= budget // 4:
        assert len(bins) <= np.ceil(sum(lengths) / budget / (1 - 1 / 4)) + 1


def karmarkar_karp(costs: list[float], num_ranks: int) -> float:
    """Largest load of the differencing method: the obvious version, as an oracle."""
    heap = [(-cost, i, [cost] + [0.0] * (num_ranks - 1)) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    tie = itertools.count(len(costs))
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        loads = sorted((x + y for x, y in zip(sorted(a), sorted(b, reverse=True), strict=True)), reverse=True)
        heapq.heappush(heap, (loads[-1] - loads[0], next(tie), loads))
    return max(heap[0][2])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_balance_covers_all_and_leaves_no_rank_idle(lengths: list[int], num_ranks: int) -> None:
    ranks = balance(lengths, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(i for indices in ranks for i in indices) == list(range(len(lengths)))
    assert all(ranks) or len(lengths) < num_ranks
    assert ranks == balance(lengths, num_ranks)


@pytest.mark.parametrize(("num_items", "num_ranks"), [(16, 2), (32, 4), (64, 8), (512, 64)])
def test_balance_is_as_good_as_karmarkar_karp(num_items: int, num_ranks: int) -> None:
    ours, theirs = [], []
    for seed in range(10):
        lengths = np.random.default_rng(seed).integers(100, 2000, num_items)
        ranks = balance(lengths.tolist(), num_ranks)
        ours.append(max(lengths[indices].sum() for indices in ranks) * num_ranks / lengths.sum())
        theirs.append(karmarkar_karp(lengths.tolist(), num_ranks) * num_ranks / lengths.sum())
    assert max(ours) <= 1.05
    assert np.mean(ours) <= np.mean(theirs) + 2e-3
