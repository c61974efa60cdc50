"""The combinations of a sweep."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the points of a sweep"),
        ("[1]", "not the points of a sweep"),
        ('"a=1"', "not the points of a sweep"),
        ("null", "not the points of a sweep"),
        ('{"a": [1]}', "point a is no list of key=value"),
        ('{"a": ["b"]}', "point a is no list of key=value"),
        ('{"a": "b=1"}', "point a is no list of key=value"),
        ('{"a": {"b=1": 2}}', "point a is no list of key=value"),
        ('{"a": null}', "point a is no list of key=value"),
        ('{"..": ["b=1"]}', "'..' is no name of a point"),
        ('{"": ["b=1"]}', "'' is no name of a point"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError) as raised:
        read_points(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/sweep.json: damaged: {message}: remove the file, and give")
