"""One start of one stage on this rank, what came before the stage, and its manifest when it is done."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.run.manifest import MANIFEST_NAME, read_manifest, write_manifest
from megatron_vcppo.run.startup import startup

ACTOR_STAGES = ("sft", "ppo")
"""Stages that leave an actor for the next ones."""


@dataclass(frozen=True)
class Stage:
    """What every part of a stage needs to know."""

    name: str
    config: Config
    folder: Path
    """RUN/STAGE"""
    runtime: runtime.Runtime

    @property
    def packer(self) -> Packer:
        """How this rank's replica packs its shard of a batch."""
        return Packer.of(self.config.parallel, self.config.model, self.runtime.dp_rank, self.runtime.dp_size)

    def mark_done(self, checkpoint: Path | None = None, outputs: tuple[str, ...] = ()) -> None:
        """Write the stage's manifest over its outputs; see ``mark_done``. Main rank only."""
        mark_done(self.folder, checkpoint, outputs)


def start_stage(config: Config, name: str) -> Stage:
    """Join the other ranks; collective."""
    folder = stage_folder(config, name)
    joined = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    return Stage(name, config, folder, joined)


def stage_folder(config: Config, stage: str) -> Path:
    """RUN/STAGE, made if it is not there."""
    folder = Path(config.run.dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mark_done(folder: Path, checkpoint: Path | None = None, outputs: tuple[str, ...] = ()) -> None:
    """Write the stage's manifest over its outputs: the last checkpoint and named files or folders. Main rank only."""
    known = {}
    meta = {}
    only = list(outputs)
    if checkpoint is not None:
        name = checkpoint.relative_to(folder).as_posix()
        only.append(name)
        meta["checkpoint"] = name
        known = {f"{name}/{file}": record for file, record in read_manifest(checkpoint)["files"].items()}
    write_manifest(folder, meta, known=known, only=only)


def last_checkpoint(config: Config, stage: str, component: str) -> Path | None:
    """The component's folder in the final checkpoint of a finished earlier stage, None if it has not run."""
    folder = Path(config.run.dir) / stage
    if not (folder / MANIFEST_NAME).exists():
        return None
    meta = read_manifest(folder)["meta"]
    path = folder / meta["checkpoint"] / component
    return path if path.is_dir() else None


def actor_before(config: Config, stage: str) -> Path | None:
    """The newest actor that the stages before this one left: a checkpoint's component folder.

    None if there is no such stage in the chain: then model.hf itself is the actor. Raises UserError if there is one
    but it is not done.
    """
    position = config.stages.index(stage) if stage in config.stages else len(config.stages)
    for earlier in reversed(config.stages[:position]):
        if earlier in ACTOR_STAGES:
            found = last_checkpoint(config, earlier, "actor")
            if found is None:
                raise UserError(f"stage {stage} needs the actor of stage {earlier}, which is not done: run it first")
            return found
    return None
