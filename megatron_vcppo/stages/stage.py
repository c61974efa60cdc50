"""One start of one stage on this rank, and the actor that the stages before it left."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.folder import RunFolder, StageFolder

ACTOR_STAGES = ("sft", "ppo")
"""Stages that leave an actor for the next ones."""


@dataclass(frozen=True)
class Stage:
    """What every part of a stage needs to know."""

    config: Config
    folder: StageFolder
    runtime: runtime.Runtime

    @property
    def name(self) -> str:
        """Such as ppo."""
        return self.folder.name

    @property
    def packer(self) -> Packer:
        """How this rank's replica packs its shard of a batch."""
        return Packer.of(self.config.parallel, self.config.model, self.runtime.dp_rank, self.runtime.dp_size)


def start_stage(config: Config, name: str) -> Stage:
    """Make the stage's folder and join the other ranks; collective."""
    folder = RunFolder.of(config).stage(name).make()
    joined = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    return Stage(config, folder, joined)


def actor_before(config: Config, stage: str) -> Path | None:
    """The newest actor that the stages before this one left: a checkpoint's component folder.

    None if there is no such stage in the chain: then model.hf itself is the actor. Raises UserError if there is one
    but it is not done.
    """
    earlier = actor_stage_before(config, stage)
    if earlier is None:
        return None
    found = earlier.last_checkpoint("actor")
    if found is None:
        raise UserError(f"stage {stage} needs the actor of stage {earlier.name}, which is not done: run it first")
    return found


def actor_stage_before(config: Config, stage: str) -> StageFolder | None:
    """The last stage before this one that leaves an actor; None if there is none in the chain."""
    position = config.stages.index(stage) if stage in config.stages else len(config.stages)
    names = (name for name in reversed(config.stages[:position]) if name in ACTOR_STAGES)
    return next((RunFolder.of(config).stage(name) for name in names), None)


def reward_model_folder(config: Config) -> Path | None:
    """Where the reward model's weights are; None without one. Raises UserError if its stage is not done."""
    settings = config.rewards.model
    if settings.path is not None:
        return Path(settings.path)
    if settings.stage is None:
        return None
    folder = RunFolder.of(config).stage(settings.stage).last_checkpoint("critic")
    if folder is None:
        raise UserError(f"rewards.model.stage {settings.stage}: that stage is not done: run it first")
    return folder
