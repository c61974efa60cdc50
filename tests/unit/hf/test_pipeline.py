"""How layers are divided over pipeline stages."""

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.pipeline import stage_layers


@pytest.mark.parametrize(
    ("num_layers", "pp", "ends", "expected"),
    [
        (32, 4, (None, None), (8, 8, 8, 8)),
        (5, 1, (None, None), (5,)),
        (28, 8, (None, None), (2, 4, 4, 4, 4, 4, 4, 2)),
        (5, 2, (None, None), (3, 2)),
        (25, 8, (None, None), (2, 4, 4, 4, 3, 3, 3, 2)),
        (32, 4, (None, 5), (9, 9, 9, 5)),
        (32, 4, (7, 6), (7, 10, 9, 6)),
        (5, 2, (4, None), (4, 1)),
        (5, 2, (2, 3), (2, 3)),
        (5, 1, (2, 3), (5,)),
    ],
)
def test_layers_of_each_stage(num_layers, pp, ends, expected):
    assert stage_layers(num_layers, pp, ends) == expected


def test_every_division_is_whole_and_no_stage_is_longer_than_needed():
    for pp in range(1, 17):
        for num_layers in range(pp, 70):
            layers = stage_layers(num_layers, pp)
            assert sum(layers) == num_layers and len(layers) == pp and min(layers) >= 1
            assert max(layers) == -(-num_layers // pp)
            assert layers[-1] <= min(layers[1:-1], default=layers[0]) and layers[-1] <= layers[0]


@pytest.mark.parametrize(
    ("num_layers", "pp", "ends", "message"),
    [
        (3, 4, (None, None), "3 layers cannot be divided over pp 4"),
        (8, 4, (4, 3), "parallel.first_stage_layers 4 and parallel.last_stage_layers 3 leave 1 of 8 layers to 2 other"),
        (8, 2, (4, 3), "leave 1 of 8 layers to 0 other stages of pp 2"),
        (8, 2, (None, 9), "parallel.last_stage_layers 9 leave -1 of 8"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_numbers(num_layers, pp, ends, message):
    with pytest.raises(UserError, match=message):
        stage_layers(num_layers, pp, ends)
