"""A run's folder and those of its stages: where everything is, what is done, how far it is."""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vcppo.config import Config
from megatron_vcppo.config.sections.run import Access
from megatron_vcppo.errors import UserError, storage_error
from megatron_vcppo.run.files import read_json, read_json_lines, remove
from megatron_vcppo.run.manifest import MANIFEST_NAME, path_inside, read_manifest, verify_manifest, write_manifest

STATE_NAME = "state.json"
"""In a checkpoint: the iteration and what the stage keeps besides weights."""
SECRET_NAME = "secret"
RECENT_BYTES = 1 << 18
LOCK_ATTEMPTS, LOCK_RETRY_S = 5, 0.05
_ATTEMPT = re.compile(r"attempt_\d{1,9}")
_ITERATION = re.compile(r"iter_(\d{7,18})$")


def iteration_name(iteration: int) -> str:
    """What belongs to an iteration is called like this. Example: ``iter_0000120``."""
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration of a name that ``iteration_name`` gave, None for other names."""
    match = _ITERATION.match(name)
    return int(match[1]) if match else None


class InUse(UserError):
    """Another process holds the run."""


@dataclass(frozen=True)
class StageFolder:
    """RUN/STAGE: the paths of one stage, and what they say about it."""

    path: Path

    @property
    def name(self) -> str:
        """The stage."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints, one per saved iteration."""
        return self.path / "checkpoints"

    def checkpoint(self, iteration: int) -> Path:
        """The folder of one checkpoint, which holds a sub-folder per component."""
        return self.checkpoints / iteration_name(iteration)

    @property
    def kept(self) -> Path:
        """Checkpoints that stay when newer ones replace them (run/kept.py)."""
        return self.path / "kept"

    def kept_checkpoint(self, iteration: int) -> Path:
        """The folder of one of them."""
        return self.kept / iteration_name(iteration)

    @property
    def best(self) -> Path:
        """A link to the best of them."""
        return self.kept / "best"

    @property
    def rollouts(self) -> Path:
        """What the stage generated (run/rollout_store.py)."""
        return self.path / "rollouts"

    @property
    def rendezvous(self) -> Path:
        """Where the engines of the stage publish their addresses."""
        return self.path / "rendezvous"

    @property
    def secret(self) -> Path:
        """What the processes of an attempt know each other by (run/secret.py)."""
        return self.rendezvous / SECRET_NAME

    @property
    def logs(self) -> Path:
        """A folder per attempt, with a file per role."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """A record per iteration (run/metrics_log.py)."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard (run/tensorboard_log.py)."""
        return self.path / "tensorboard"

    @property
    def profiles(self) -> Path:
        """Position profiles of PPO, a record per iteration."""
        return self.path / "profiles.jsonl"

    @property
    def startup(self) -> Path:
        """Where the time of each start went (run/events.py)."""
        return self.path / "startup.jsonl"

    @property
    def results(self) -> Path:
        """What the stage evaluate found."""
        return self.path / "results.json"

    @property
    def results_table(self) -> Path:
        """The same as a Markdown table."""
        return self.path / "results.md"

    @property
    def manifest(self) -> Path:
        """Written last: the stage is done."""
        return self.path / MANIFEST_NAME

    def data(self, name: str) -> Path:
        """The tokenized examples of a data set."""
        return self.path / "data" / name

    def exported(self, component: Literal["actor", "critic", "peft"]) -> Path:
        """Where the stage export puts a model, unless export.out names another place for the actor. peft: the actor's
        adapters alone."""
        return self.path / ("hf" if component == "actor" else component)

    def make(self) -> "StageFolder":
        """Make the folder if it is not there; returns the same."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def mark_done(self, checkpoint: Path | None = None, outputs: tuple[str, ...] = ()) -> None:
        """Write the stage's manifest over its outputs: the last checkpoint and named files or folders.

        Main rank only.
        """
        known = {}
        meta = {}
        only = list(outputs)
        if checkpoint is not None:
            name = checkpoint.relative_to(self.path).as_posix()
            only.append(name)
            meta["checkpoint"] = name
            known = {f"{name}/{file}": record for file, record in read_manifest(checkpoint)["files"].items()}
        write_manifest(self.path, meta, known=known, only=only)

    def marked_done(self) -> bool:
        """True if the stage has a manifest, verified or not."""
        return self.manifest.exists()

    def is_done(self, checksums: bool = True) -> bool:
        """True if the stage's manifest verifies; UserError if there is one that does not."""
        if not self.marked_done():
            return False
        verify_manifest(self.path, checksums)
        return True

    def last_checkpoint(self, component: str) -> Path | None:
        """The component's folder in the final checkpoint; None if the stage is not done or has no such component."""
        checkpoint = self.manifest_checkpoint()
        return checkpoint / component if checkpoint and (checkpoint / component).is_dir() else None

    def manifest_checkpoint(self) -> Path | None:
        """The final checkpoint; None if the stage is not done or leaves none."""
        if not self.marked_done():
            return None
        name = read_manifest(self.path)["meta"].get("checkpoint")
        return None if name is None else path_inside(self.path, name)

    def named_checkpoint(self, name: str) -> Path:
        """A checkpoint by its name: best, or iter_N with or without leading zeros. UserError if it is not there."""
        if name == "best":
            found = [self.best.resolve()] if self.best.is_dir() else []
        else:
            iteration = int(name.removeprefix("iter_"))
            # A kept one is whole; one of the same iteration may have been saved within the next update.
            found = [path for path in (self.kept_checkpoint(iteration), self.checkpoint(iteration)) if path.is_dir()]
        if not found:
            there = {path.name for folder in (self.checkpoints, self.kept) for path in folder.glob("iter_*")}
            raise UserError(f"{self.path}: no checkpoint {name}; there are: {', '.join(sorted(there)) or 'none'}")
        return found[0]

    def checkpoint_iteration(self) -> int | None:
        """Iteration of the newest checkpoint that has a manifest."""
        complete = [path.parent.name for path in self.checkpoints.glob(f"*/{MANIFEST_NAME}")]
        return max((found for name in complete if (found := iteration_of(name)) is not None), default=None)

    def attempt(self, number: int) -> Path:
        """The log folder of one attempt, counted from 1."""
        return self.logs / f"attempt_{number}"

    def attempts(self) -> list[Path]:
        """The log folders of the stage's attempts, oldest first."""
        named = (path for path in self.logs.glob("attempt_*") if _ATTEMPT.fullmatch(path.name))
        return sorted(named, key=_attempt_number)

    def next_attempt(self) -> Path:
        """The log folder of the next attempt, not yet made."""
        attempts = self.attempts()
        return self.attempt(_attempt_number(attempts[-1]) + 1 if attempts else 1)

    def recent_metrics(self) -> list[dict[str, Any]]:
        """The last records of the metrics log, as many as fit into RECENT_BYTES."""
        return read_json_lines(self.metrics, RECENT_BYTES)

    def progress(self, rollouts: Path) -> list[int]:
        """What a start of the stage leaves to the next one, as numbers that change if there is more of it.

        Iterations in the newest checkpoint (-1: there is none), optimizer steps of the iteration after, stored
        iterations of rollouts, bytes of responses of those that are not complete. rollouts: the folder of what the
        stage generates.
        """
        iteration, steps = self.checkpoint_iteration(), 0
        if iteration is not None:
            path = self.checkpoint(iteration) / STATE_NAME
            with suppress(OSError, ValueError, KeyError, TypeError):
                skipped = read_json(path)["state"]["unfinished"]["report"]["skipped"]
                steps = sum(len(model) for model in skipped.values())
        complete = len(list(rollouts.glob("iter_*")))  # run/rollout_store.py, without its imports
        partial_bytes = sum(path.stat().st_size for path in rollouts.glob("partial_*"))
        return [-1 if iteration is None else iteration, steps, complete, partial_bytes]


@dataclass(frozen=True)
class RunFolder:
    """RUN: the paths of one run, and the lock of whoever starts its stages."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """run.dir of a configuration; ``~`` is the user's home."""
        return cls(Path(config.run.dir).expanduser())

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        """What happened to the run (run/events.py)."""
        return self.path / "events.jsonl"

    @property
    def code(self) -> Path:
        """Snapshots of the code that its jobs run."""
        return self.path / "code"

    @property
    def slurm(self) -> Path:
        """Batch scripts and logs of its jobs."""
        return self.path / "slurm"

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage."""
        return StageFolder(self.path / name)

    def stages(self) -> list[StageFolder]:
        """Every folder in the run that may be a stage's, by name."""
        folders = (path for path in self.path.glob("*") if path.is_dir() and not path.name.startswith("."))
        return [StageFolder(path) for path in sorted(folders)]

    def preloaded_log(self, role: str) -> Path:
        """What libraries write while they are imported for all processes of a role (launch/preloaded.py)."""
        return self.path / f"preloaded_{role}.log"

    @property
    def lock(self) -> Path:
        """Held by whoever starts stages."""
        return self.path / ".lock"

    def job_log(self, job: str) -> Path:
        """What a job's controller writes, by submitit's naming."""
        return self.slurm / f"{job}_0_log.out"

    def make(self) -> None:
        """Make the folder, private to the user. UserError if that, or writing into it, is not possible."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir {self.path}: {error.strerror}") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"run.dir {self.path}: cannot be written: {os.strerror(errno.EACCES)}")

    @contextmanager
    def removed_if_new(self) -> Iterator[None]:
        """Where the block raises, a folder that it made is removed with what was written into it."""
        before = self.path.exists()
        try:
            yield
        except BaseException:
            if not before:
                remove(self.path)
            raise

    def open_to(self, access: Access) -> None:
        """Let only the user, or also read the folder's group, into the run. For the holder of the lock.

        What is made below it belongs to the same group.
        """
        if access != "as_is":
            self.path.chmod(0o700 if access == "private" else 0o2750)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by whoever starts stages: one at a time. InUse if another process has it."""
        # Not emptied, and no link is followed: the folder may be from elsewhere.
        lock = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            for attempt in range(LOCK_ATTEMPTS):  # in_use holds it for a moment
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == LOCK_ATTEMPTS - 1:
                        raise InUse(f"{self.path}: another vcppo run or submit is at work in this run") from None
                    time.sleep(LOCK_RETRY_S)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def storage_errors_named(self) -> Iterator[None]:
        """A storage that is full or fails, and a folder that was moved meanwhile: one line, not a traceback."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.is_gone():
                raise UserError(self.gone_text) from None
            if found := storage_error(error, str(self.path), f"vcppo resume {self.path}"):
                raise found from None
            raise

    def is_gone(self) -> bool:
        """Whether nothing of that name is a run any more."""
        try:
            self.config.stat()
        except FileNotFoundError:
            return True
        except OSError:  # a file system that does not answer just now
            pass
        return False

    @property
    def gone_text(self) -> str:
        """For a run that was there when its stages started."""
        return (
            f"{self.path}: renamed or removed while it ran: vcppo resume NEW-NAME continues from the newest checkpoint"
        )

    def in_use(self) -> bool:
        """True while a process on this machine holds the run; writes nothing, so the run may be another user's."""
        try:
            lock = os.open(self.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False


def _attempt_number(folder: Path) -> int:
    return int(folder.name.rsplit("_", 1)[1])
