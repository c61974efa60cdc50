"""Which checkpoints are kept: the rule, and the folders after any history of saves and kills."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import CheckpointConfig, KeepBestConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.run import files, kept
from megatron_vcppo.run.files import append_json_line, write_json
from megatron_vcppo.run.folder import STATE_NAME, StageFolder
from megatron_vcppo.run.kept import KeptCheckpoints, best_first, remove_checkpoint, worth_keeping
from megatron_vcppo.run.manifest import verify_manifest, write_manifest

METRIC = "evaluation/avg"
SCORES = {2: 0.3, 4: 0.6, 6: 0.7, 8: 0.5, 10: 0.2}
"""A run that peaks at 6 and decays."""


def settings(count: int = 2, mode: Any = "max", keep_every: int = 0, keep_last: int = 1) -> CheckpointConfig:
    return CheckpointConfig(keep_last=keep_last, keep_every=keep_every, keep_best=KeepBestConfig(METRIC, count, mode))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (settings(), {4, 6}),
        (settings(count=1), {6}),
        (settings(count=9), set(SCORES)),
        (settings(mode="min"), {2, 10}),
        (settings(count=1, keep_every=5), {6, 10}),
        (CheckpointConfig(keep_every=4), {4, 8}),
        (CheckpointConfig(), set()),
    ],
)
def test_the_best_and_every_nth_are_worth_keeping(chosen: CheckpointConfig, expected: set[int]) -> None:
    assert worth_keeping(list(SCORES), SCORES if chosen.keep_best.metric else {}, chosen) == expected


def test_of_equal_scores_the_earlier_is_better_and_what_is_no_number_is_none() -> None:
    scores = {1: 0.5, 2: float("nan"), 3: 0.5, 4: float("inf"), 5: 0.4}
    assert best_first([5, 4, 3, 2, 1, 6], scores, KeepBestConfig(METRIC)) == [1, 3, 5]


class Stage:
    """A stage that saves without a model."""

    def __init__(self, folder: Path, chosen: CheckpointConfig) -> None:
        self.folder, self.chosen = StageFolder(folder).make(), chosen
        self.folder.checkpoints.mkdir(exist_ok=True)

    def start(self, reached: int = 0) -> None:
        self.kept = KeptCheckpoints(self.folder, self.chosen)
        self.kept.start(reached)

    def log(self, iteration: int, score: float | None) -> None:
        metrics = {} if score is None else {METRIC: score}
        append_json_line(self.folder.metrics, {"iteration": iteration, **metrics})
        self.kept.note(iteration, metrics)

    def put(self, iteration: int, weights: str, unfinished: bool = False) -> None:
        """A complete checkpoint; one of this iteration is replaced, as CheckpointFolder does."""
        final = self.folder.checkpoint(iteration)
        temporary = final.with_name(f".{final.name}.tmp")
        (temporary / "actor").mkdir(parents=True)
        (temporary / "actor" / "weights").write_text(weights)
        write_json(temporary / STATE_NAME, {"state": {"unfinished": {}} if unfinished else {}})
        write_manifest(temporary, {"iteration": iteration})
        if final.exists():
            remove_checkpoint(final)
        files.move(temporary, final)

    def finish_save(self, iteration: int) -> None:
        self.kept.update(iteration)
        for old in sorted(self.folder.checkpoints.glob("iter_*"))[: -self.chosen.keep_last]:
            remove_checkpoint(old)

    def train(self, scores: Mapping[int, float]) -> None:
        for iteration, score in scores.items():
            self.log(iteration, score)
            self.put(iteration, f"{iteration}")
            self.finish_save(iteration)

    def found(self) -> dict[str, str]:
        """name → its weights, of all that is kept."""
        folders = sorted(self.folder.kept.iterdir())
        for path in folders:
            verify_manifest(path)
        return {path.name: (path / "actor" / "weights").read_text() for path in folders}


def test_a_run_that_peaks_and_decays_keeps_its_best(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(keep_every=10))
    stage.start()
    stage.train(SCORES)
    assert [path.name for path in stage.folder.checkpoints.iterdir()] == ["iter_0000010"]
    best = {"best": "6", "iter_0000004": "4", "iter_0000006": "6"}
    assert stage.found() == best | {"iter_0000010": "10"}
    assert stage.folder.named_checkpoint("best") == stage.folder.kept_checkpoint(6)
    assert stage.folder.named_checkpoint("iter_4") == stage.folder.kept_checkpoint(4)
    one, other = (
        folder(10) / "actor" / "weights" for folder in (stage.folder.checkpoint, stage.folder.kept_checkpoint)
    )
    assert one.samefile(other), "a link, not a copy"


def test_nothing_is_made_where_nothing_is_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, CheckpointConfig(keep_last=1))
    stage.start()
    stage.train(SCORES)
    assert not stage.folder.kept.exists()


def test_only_a_score_among_the_best_asks_for_a_checkpoint(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings())
    stage.start()
    stage.train({2: 0.3, 4: 0.6})
    for iteration, score, taken in ((5, 0.2, False), (6, None, False), (7, 0.3, False), (8, 0.4, True), (9, 0.7, True)):
        stage.log(iteration, score)
        assert stage.kept.takes_as_best(iteration) is taken, (iteration, score)


def test_a_stop_within_the_next_update_does_not_change_the_best(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(count=1))
    stage.start()
    stage.train({2: 0.3, 4: 0.6})
    stage.put(4, "weights on the way to 5", unfinished=True)
    stage.finish_save(4)
    assert stage.found() == {"best": "4", "iter_0000004": "4"}
    assert stage.folder.named_checkpoint("iter_4") == stage.folder.kept_checkpoint(4)
    stage.start(4)
    assert stage.found() == {"best": "4", "iter_0000004": "4"}


def test_steps_that_are_done_again_replace_what_they_left(tmp_path: Path) -> None:
    """The newest checkpoint was damaged: the stage continues from the one before."""
    stage = Stage(tmp_path, settings(count=1, keep_last=2))
    stage.start()
    stage.train({2: 0.3, 4: 0.6})
    stage.start(2)
    assert stage.found() == {"best": "2", "iter_0000002": "2", "iter_0000004": "4"}, "until there is another 4"
    stage.log(4, 0.5)
    stage.put(4, "again")
    stage.finish_save(4)
    assert stage.found() == {"best": "again", "iter_0000004": "again"}


def test_a_metric_that_nothing_has_logged_costs_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(count=1))
    stage.start()
    stage.train({2: 0.3, 4: 0.6})
    stage.chosen = CheckpointConfig(keep_last=1, keep_best=KeepBestConfig("evaluation/misspelled"))
    stage.start(4)
    assert stage.found() == {"best": "4", "iter_0000004": "4"}


class Killed(BaseException):
    """Nothing catches it and cleans up."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> bool:
    """Do ``work`` until its n-th change of the file system; False if it has fewer."""
    left = number

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*arguments, **named)

        return one

    with monkeypatch.context() as patch:
        for owner, name in ((os, "link"), (os, "replace"), (Path, "symlink_to"), (kept, "remove"), (files, "remove")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_kill_at_any_point_is_finished_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_kills = 0
    for number in range(100):
        stage = Stage(tmp_path / str(number), settings(count=1, keep_last=2))
        stage.start()
        stage.train({2: 0.3, 4: 0.6})
        stage.log(6, 0.7)
        stage.put(6, "6")
        killed = killed_at(number, monkeypatch, lambda: stage.kept.update(6))  # noqa: B023
        assert stage.folder.named_checkpoint("best").name in ("iter_0000004", "iter_0000006")
        verify_manifest(stage.folder.best)
        stage.start(6)
        assert stage.found() == {"best": "6", "iter_0000006": "6"}, f"killed at change {number}"
        if not killed:
            break
        num_kills += 1
    assert num_kills > 8


def test_a_file_system_without_hard_links_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"no hard links \(Operation not supported\).*keep_last=0"):
        KeptCheckpoints(StageFolder(tmp_path), settings())
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"state": 3})])
def test_a_checkpoint_with_a_damaged_state_is_not_kept(tmp_path: Path, text: str) -> None:
    stage = Stage(tmp_path, settings(count=1))
    stage.start()
    stage.log(2, 0.3)
    stage.put(2, "2")
    (stage.folder.checkpoint(2) / STATE_NAME).write_text(text)
    stage.kept.update(2)
    assert stage.found() == {}
