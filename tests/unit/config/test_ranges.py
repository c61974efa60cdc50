"""The range next to each key: every number has one, and the checker looks into optional values, lists and maps."""

import typing
from pathlib import Path
from typing import Annotated, Any

import pytest

from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.ranges import PositiveInt, Range, out_of_range, range_of
from megatron_vcppo.errors import UserError


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-0.1, 1]),
        ("(0, 1]", [1e-9, 1], [0, 1.1]),
        ("[1, inf)", [1, 10**9], [0, float("inf")]),
        ("(-inf, inf)", [-1e300, 0], [float("nan"), float("inf"), float("-inf")]),
    ],
)
def test_an_interval_holds_its_numbers(text: str, inside: list[float], outside: list[float]) -> None:
    assert all(value in Range(text) for value in inside)
    assert not any(value in Range(text) for value in outside)


@pytest.mark.parametrize(
    ("annotation", "value", "names"),
    [
        (PositiveInt, 0, ["key"]),
        (PositiveInt | None, None, []),
        (PositiveInt | None, -1, ["key"]),
        (list[PositiveInt], [1, 0, 2, -1], ["key[1]", "key[3]"]),
        (dict[str, PositiveInt], {"sft": 0, "ppo": 3}, ["key.sft"]),
        (list[Annotated[float, Range("[0, 1]")]] | None, [2.0], ["key[0]"]),
        (str, "text", []),
        (bool, False, []),
    ],
)
def test_values_within_values_are_checked(annotation: Any, value: Any, names: list[str]) -> None:
    assert [name for name, _, _ in out_of_range("key", annotation, value)] == names


def numbers(annotation: Any) -> bool:
    """Whether a type holds a number that no range bounds."""
    if range_of(annotation) or typing.get_origin(annotation) is typing.Literal:
        return False
    arguments = typing.get_args(annotation)
    return annotation in (int, float) or any(numbers(argument) for argument in arguments)


def test_every_number_has_a_range() -> None:
    """A number without a limit says so: FiniteFloat."""
    assert numbers(dict[str, int]) and numbers(float | None) and not numbers(PositiveInt | None)
    assert not [key.name for key in all_keys().values() if numbers(key.annotation)]


def test_every_default_is_in_its_range() -> None:
    assert not [
        problem for key in all_keys().values() for problem in out_of_range(key.name, key.annotation, key.default)
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "sft:\n  optimizer:\n    beta2: 1",
            [],
            "c.yaml:3: sft.optimizer.beta2 must be in [0, 1), got 1.0",
        ),
        (
            "cluster:\n  stage_time_limit_minutes:\n    sft: 5\n    export: 0",
            [],
            "c.yaml:4: cluster.stage_time_limit_minutes.export must be in [1, inf), got 0",
        ),
        (
            "cluster:\n  stage_time_limit_minutes:\n    sft: 0",
            ["cluster.stage_time_limit_minutes.export=5"],
            "c.yaml:3: cluster.stage_time_limit_minutes.sft must be in [1, inf), got 0",
        ),
        ("evaluate:\n  k: [1, 0]", [], "c.yaml:2: evaluate.k[1] must be in [1, inf), got 0"),
        ("sft: {steps: 5}", ["sft.steps=0"], "command line: sft.steps must be in [1, inf), got 0"),
        ("ppo: {loss: {dual_clip: 1}}", [], "c.yaml:1: ppo.loss.dual_clip must be in (1, inf), got 1.0"),
        ("sft: {optimizer: {lr: .nan}}", [], "c.yaml:1: sft.optimizer.lr must be in [0, inf), got nan"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_place(
    text: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as failure:
        load_config(file, overrides, complete=False)
    assert str(failure.value) == f"{tmp_path}/{message}".replace(f"{tmp_path}/command", "command")


def test_problems_in_several_places_are_listed_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sft:\n  batch_size: 0")
    file = tmp_path / "b.yaml"
    file.write_text("defaults: [a]\nsft:\n  epochs: -1")
    with pytest.raises(UserError) as failure:
        load_config(file, complete=False)
    head, *lines = str(failure.value).splitlines()
    assert head == f"{file}: 2 problems in the configuration:"
    assert lines == [
        f"  {file}:3: sft.epochs must be in [1, inf), got -1",
        f"  {tmp_path / 'a.yaml'}:2: sft.batch_size must be in [1, inf), got 0",
    ]
