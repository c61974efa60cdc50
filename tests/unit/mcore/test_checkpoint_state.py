"""Ranges of row-major tensors as boxes."""

import itertools
import math

import pytest
import torch

from megatron_vcppo.mcore.checkpoint_state import boxes_of_range


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (1, 6), (3, 1), (2, 3, 4)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    tensor = torch.arange(numel).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        elements: list[int] = []
        for offsets, sizes in boxes:
            index = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            assert tensor[index].shape == sizes and math.prod(sizes) > 0
            elements += tensor[index].flatten().tolist()
        assert elements == list(range(start, stop))


def test_a_range_outside_has_no_boxes() -> None:
    assert list(boxes_of_range((4, 5), 12, 3)) == []
