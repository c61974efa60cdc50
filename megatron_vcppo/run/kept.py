"""Checkpoints that outlive ``checkpoint.keep_last``: the best by a metric, and every N-th.

``RUN/STAGE/kept/iter_N`` is a folder of hard links to the files of ``checkpoints/iter_N``, so it takes no room while
that one is there, and no later save touches it. ``kept/best`` is a symbolic link to the best of them. Which are kept
follows from the metrics log and the folders alone: whatever a kill interrupts, the next start does.
"""

import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_vcppo.config import CheckpointConfig, KeepBestConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import move, read_json, remove, replacing
from megatron_vcppo.run.folder import STATE_NAME, StageFolder, iteration_name, iteration_of
from megatron_vcppo.run.manifest import MANIFEST_NAME
from megatron_vcppo.run.metrics_log import read_history


def best_first(iterations: Collection[int], scores: Mapping[int, float], settings: KeepBestConfig) -> list[int]:
    """Those iterations that have a finite score, the best first; of equal ones the earlier."""
    sign = -1.0 if settings.mode == "max" else 1.0
    scored = [iteration for iteration in iterations if math.isfinite(scores.get(iteration, math.nan))]
    return sorted(scored, key=lambda iteration: (sign * scores[iteration], iteration))


def worth_keeping(iterations: Collection[int], scores: Mapping[int, float], settings: CheckpointConfig) -> set[int]:
    """The iterations that ``keep_best`` and ``keep_every`` keep out of these. scores: of the metric, by iteration."""
    every = {i for i in iterations if settings.keep_every and i > 0 and i % settings.keep_every == 0}
    return every | set(best_first(iterations, scores, settings.keep_best)[: settings.keep_best.count])


class KeptCheckpoints:
    """The folder ``kept`` of one stage. Main rank only."""

    def __init__(self, stage: StageFolder, settings: CheckpointConfig) -> None:
        """UserError if the settings keep something but the file system has no hard links."""
        self.stage, self.settings = stage, settings
        self.scores: dict[int, float] = {}
        """The metric of ``keep_best`` by iteration."""
        self.is_on = settings.keep_every > 0 or settings.keep_best.metric is not None
        if self.is_on:
            stage.kept.mkdir(parents=True, exist_ok=True)
            for leftover in stage.kept.glob(".*"):
                remove(leftover)  # of an attempt that was killed
            _check_hard_links(stage.kept)

    def start(self, iteration: int) -> None:
        """The stage continues after ``iteration``: do what a kill may have interrupted."""
        if not self.is_on:
            return
        for record in read_history(self.stage.path):
            if record["iteration"] <= iteration:  # later ones will be dropped from the log
                self.note(int(record["iteration"]), record)
        self.update(iteration)

    def note(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take in what was logged of an iteration."""
        metric = self.settings.keep_best.metric
        if metric is not None and metric in metrics:
            self.scores[iteration] = float(metrics[metric])

    def takes_as_best(self, iteration: int) -> bool:
        """Whether a checkpoint of this iteration, the newest, would be kept for its score."""
        known = {*self._kept(iteration), iteration}
        return iteration in best_first(known, self.scores, self.settings.keep_best)[: self.settings.keep_best.count]

    def update(self, newest: int) -> None:
        """Keep what is worth it of the complete checkpoints up to the newest, drop what no longer is.

        Kept ones after ``newest`` come from steps that will be done again; they stay until these are.
        """
        if not self.is_on:
            return
        saved = [i for path in self.stage.checkpoints.glob("*") if (i := iteration_of(path.name)) is not None]
        wanted = worth_keeping([i for i in saved if i <= newest], self.scores, self.settings)
        whole = {i for i in wanted if self._is_whole(i)}
        known = whole | self._kept(newest)
        due = worth_keeping(known, self.scores, self.settings)
        for iteration in sorted(due & whole):
            self._link(iteration)
        best = best_first(due, self.scores, self.settings.keep_best)
        if best:
            self._point_to(best[0])
        if self.settings.keep_best.metric is not None and not best:
            return  # a metric that was not measured yet, or is misspelled, must not cost the best by another one
        for iteration in self._kept(newest) - due:
            remove_checkpoint(self.stage.kept_checkpoint(iteration))

    def _kept(self, newest: int) -> set[int]:
        found = (iteration_of(path.name) for path in self.stage.kept.glob("*"))
        return {iteration for iteration in found if iteration is not None and iteration <= newest}

    def _is_whole(self, iteration: int) -> bool:
        """Whether the checkpoint has a manifest and was not saved within the next update, with weights on the way."""
        path = self.stage.checkpoint(iteration)
        try:
            content = read_json(path / STATE_NAME)
            return (path / MANIFEST_NAME).exists() and "unfinished" not in content["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _link(self, iteration: int) -> None:
        source, target = self.stage.checkpoint(iteration), self.stage.kept_checkpoint(iteration)
        manifest = target / MANIFEST_NAME
        if manifest.exists() and manifest.samefile(source / MANIFEST_NAME):
            return
        with replacing(target) as temporary:
            shutil.copytree(source, temporary, copy_function=os.link)

    def _point_to(self, iteration: int) -> None:
        link, name = self.stage.best, iteration_name(iteration)
        if link.is_symlink() and os.readlink(link) == name:
            return
        temporary = link.with_name(f".{link.name}.tmp")
        remove(temporary)
        temporary.symlink_to(name)
        move(temporary, link)


def remove_checkpoint(checkpoint: Path) -> None:
    """Take the final name away first: what a kill leaves half removed is no checkpoint."""
    leftover = checkpoint.with_name(f".{checkpoint.name}.old")
    move(checkpoint, leftover)
    remove(leftover)


def _check_hard_links(folder: Path) -> None:
    one, two = folder / ".link_1", folder / ".link_2"
    one.touch()
    try:
        os.link(one, two)
    except OSError as error:
        raise UserError(
            f"{folder}: its file system has no hard links ({error.strerror}), which checkpoint.keep_best and "
            "keep_every need: unset them and keep all with checkpoint.keep_last=0"
        ) from None
    finally:
        remove(one)
        remove(two)
