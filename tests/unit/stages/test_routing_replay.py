"""Stored experts are kept as long as a resume may train their iteration again."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.rollout_store import read_places, write_rollouts
from megatron_vcppo.stages.ppo import Ppo

ROLLOUT = Rollout(Prompt("p", (1, 2), "", "", "t"), 0, 7, (3, 4), "", (-1.0, -2.0), "stop", 0, 1.0)


@pytest.mark.parametrize(
    ("checkpoints", "window", "kept"),
    [((), None, [1, 2, 3, 4]), ((2, 3), None, [3, 4]), ((4,), None, []), ((2, 3), 8, [2, 3, 4]), ((4,), 8, [4])],
)
def test_experts_go_when_the_oldest_checkpoint_is_past_them(
    tmp_path: Path, checkpoints: tuple[int, ...], window: int | None, kept: list[int]
) -> None:
    """A resume may take the oldest checkpoint, if the newer ones are damaged; with windows it continues what the
    checkpoint's iteration left unfinished."""
    for iteration in range(1, 5):
        part = RolloutPart.whole([replace(ROLLOUT, routed_experts=b"abc")])
        write_rollouts(tmp_path / "rollouts", iteration, part)
    for iteration in checkpoints:
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    ppo: Any = SimpleNamespace(
        config=SimpleNamespace(ppo=SimpleNamespace(window_tokens=window)),
        experts=object(),
        loop=SimpleNamespace(checkpoints=SimpleNamespace(folder=tmp_path / "checkpoints")),
        session=SimpleNamespace(
            batches=SimpleNamespace(folder=tmp_path / "rollouts"), runtime=SimpleNamespace(is_main=True)
        ),
        sampler=SimpleNamespace(last_number=lambda iteration: iteration),
    )
    Ppo.drop_experts(ppo)
    found = {iteration: read_places(tmp_path / "rollouts", iteration).rollouts[0] for iteration in range(1, 5)}
    assert [iteration for iteration, rollout in found.items() if rollout.routed_experts] == kept
