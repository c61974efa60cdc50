"""The combinations of a sweep."""

from pathlib import Path

import pytest

from megatron_vcppo.commands.sweep import text_table
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.sweep_points import points, read_points, write_points


def test_sweep_points(tmp_path: Path) -> None:
    made, fixed = points(["a=[1, 2]", "b=3", "c=[x, y]"])
    assert fixed == ["b=3"] and [point.overrides for point in made] == [
        ("a=1", "c=x"), ("a=1", "c=y"), ("a=2", "c=x"), ("a=2", "c=y"),
    ]  # fmt: skip
    write_points(tmp_path, made)
    assert read_points(tmp_path) == made
    with pytest.raises(UserError, match="another sweep lives here"):
        write_points(tmp_path, made[:1])
    with pytest.raises(UserError, match="nothing varies"):
        points(["a=1"])
    assert text_table([{"run": "0", "loss": 0.123456}]) == "run  loss\n0    0.1235"


def test_lists_that_are_values_do_not_vary() -> None:
    made, fixed = points(["stages=[ppo, evaluate]", "evaluate.k=[[1], [1, 4]]", "ppo.loss.tis_cap=[null, 2.0]"])
    assert fixed == ["stages=[ppo, evaluate]"]
    assert [point.overrides for point in made] == [
        ("evaluate.k=[1]", "ppo.loss.tis_cap=null"),
        ("evaluate.k=[1]", "ppo.loss.tis_cap=2.0"),
        ("evaluate.k=[1, 4]", "ppo.loss.tis_cap=null"),
        ("evaluate.k=[1, 4]", "ppo.loss.tis_cap=2.0"),
    ]
    with pytest.raises(UserError, match="nothing varies"):
        points(["ppo.critic.bounds=[-1.0, 1.0]"])
