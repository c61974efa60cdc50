"""A run's folder as the launcher sees it: which stages are done, how far they are, where their logs go."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.manifest import MANIFEST_NAME, verify_manifest

CONFIG_NAME = "config.yaml"
LOCK_NAME = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """Paths and truths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_NAME

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name

    def rendezvous(self, stage: str) -> Path:
        """Where the engines of a stage publish their addresses."""
        return self.stage(stage) / "rendezvous"

    def job_log(self, job: str) -> Path:
        """What a job's controller writes, by submitit's naming."""
        return self.path / "slurm" / f"{job}_0_log.out"

    def done(self, stage: str, checksums: bool = True) -> bool:
        """True if the stage's manifest verifies; UserError if there is one that does not."""
        if not self.marked_done(stage):
            return False
        verify_manifest(self.stage(stage), checksums)
        return True

    def marked_done(self, stage: str) -> bool:
        """True if the stage has a manifest, verified or not."""
        return (self.stage(stage) / MANIFEST_NAME).exists()

    def attempts(self, stage: str) -> list[Path]:
        """The log folders of a stage's attempts, oldest first."""
        folders = (self.stage(stage) / "logs").glob("attempt_*")
        return sorted(folders, key=lambda folder: int(folder.name.rsplit("_", 1)[1]))

    def next_attempt(self, stage: str) -> Path:
        """The log folder of the next attempt, not yet made."""
        attempts = self.attempts(stage)
        number = int(attempts[-1].name.rsplit("_", 1)[1]) + 1 if attempts else 1
        return self.stage(stage) / "logs" / f"attempt_{number}"

    def checkpoint_iteration(self, stage: str) -> int | None:
        """Iteration of the newest checkpoint that has a manifest."""
        complete = (self.stage(stage) / "checkpoints").glob(f"iter_*/{MANIFEST_NAME}")
        return max((int(path.parent.name.rsplit("_", 1)[1]) for path in complete), default=None)

    def progress(self, stage: str, rollouts: Path) -> list[int]:
        """What a start of a stage leaves to the next one, as numbers that change if there is more of it.

        Iterations in the newest checkpoint (-1: there is none), optimizer steps of the iteration after, stored parts of
        rollouts, bytes of responses of parts that are not complete. rollouts: the folder of what the stage generates.
        """
        iteration, steps = self.checkpoint_iteration(stage), 0
        if iteration is not None:
            path = self.stage(stage) / "checkpoints" / f"iter_{iteration:07d}" / "state.json"
            with suppress(OSError, ValueError, KeyError, TypeError):
                skipped = json.loads(path.read_text(encoding="utf-8"))["state"]["unfinished"]["report"]["skipped"]
                steps = sum(len(model) for model in skipped.values())
        complete = len(list(rollouts.glob("iter_*")))
        partial_bytes = sum(path.stat().st_size for path in rollouts.glob("partial_*"))
        return [-1 if iteration is None else iteration, steps, complete, partial_bytes]

    def make(self) -> None:
        """Make the folder. UserError if that is not possible, or nothing can be written into it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir {self.path}: {error.strerror}") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"run.dir {self.path}: cannot be written: {os.strerror(errno.EACCES)}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by whoever starts stages: one at a time."""
        with (self.path / LOCK_NAME).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another vcppo run or submit is at work in this run") from None
            yield

    @contextmanager
    def full_disk_named(self) -> Iterator[None]:
        """A full disk or quota is the user's to mend, not a traceback."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{error.filename or self.path}: {error.strerror}: make room, then vcppo resume {self.path}"
            ) from None

    def in_use(self) -> bool:
        """True while a process on this machine holds the run."""
        try:
            with self.locked():
                return False
        except UserError:
            return True

    def metrics(self, stage: str, limit_bytes: int = 1 << 18) -> list[dict[str, Any]]:
        """The last records of metrics.jsonl, as many as fit into ``limit_bytes``."""
        try:
            with (self.stage(stage) / "metrics.jsonl").open("rb") as file:
                file.seek(0, 2)
                start = max(0, file.tell() - limit_bytes)
                file.seek(start)
                lines = file.read().split(b"\n")[1 if start else 0 :]
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records


def chosen_stages(stages: list[str], first: str | None, last: str | None, only: str | None) -> list[str]:
    """The part of the chain that --from, --until and --only name. UserError for a name that is not in the chain."""
    for name in (first, last, only):
        if name is not None and name not in stages:
            raise UserError(f"stage {name!r} is not in this configuration's stages: {', '.join(stages)}")
    if only is not None:
        return [only]
    start = stages.index(first) if first else 0
    end = stages.index(last) + 1 if last else len(stages)
    if start >= end:
        raise UserError(f"--from {first} comes after --until {last} in stages: {', '.join(stages)}")
    return stages[start:end]
