"""Stored sets of rollouts: where a stage keeps its set, and whether it is complete. Light: the launcher asks, too."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.run.files import write_json
from megatron_vcppo.run.folder import RunFolder

FILE_NAME = "set.json"
"""Written last of all into the folder of a set."""


@dataclass(frozen=True)
class StoredSet:
    """A folder of rollouts and how many of them a stage wants."""

    folder: Path
    num_rollouts: int
    is_own: bool
    """False: value_pretrain.stored_path names the folder, so another run may have made the set."""

    @property
    def is_complete(self) -> bool:
        """True if a set of at least ``num_rollouts`` was made here."""
        try:
            made = json.loads((self.folder / FILE_NAME).read_text(encoding="utf-8"))["num_rollouts"]
            return bool(made >= self.num_rollouts)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def mark_complete(self) -> None:
        """Record that all rollouts are there."""
        write_json(self.folder / FILE_NAME, {"num_rollouts": self.num_rollouts}, indent=None)


def unmark_complete(folder: Path) -> None:
    """Forget that a set was complete: some of its rollouts are gone."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def stored_set(config: Config, stage: str) -> StoredSet | None:
    """The set that a stage trains on; None if its rollouts are made for every step, or if it has none."""
    own = RunFolder.of(config).stage(stage).rollouts
    if stage == "reward_model":
        return StoredSet(own, config.reward_model.num_prompts * config.rollout.num_samples, True)
    settings = config.value_pretrain
    if stage == "value_pretrain" and settings.rollouts == "stored":
        folder = Path(settings.stored_path) if settings.stored_path else own
        return StoredSet(folder, settings.stored_rollouts, settings.stored_path is None)
    return None


def rollouts_folder(config: Config, stage: str) -> Path:
    """Where a stage stores what it generates."""
    found = stored_set(config, stage)
    return found.folder if found is not None else RunFolder.of(config).stage(stage).rollouts


def needs_engines(config: Config, stage: str) -> bool:
    """Whether a stage that generates has anything left to generate."""
    found = stored_set(config, stage)
    return found is None or not found.is_complete
