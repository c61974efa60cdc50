"""What every stage has: a folder, what came before it, and a manifest when it is done."""

from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.data.context_split import rounding
from megatron_vcppo.data.rollout_batch import Packer
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.runtime import Runtime
from megatron_vcppo.run.folder import RunFolder, StageFolder

ACTOR_STAGES = ("sft", "ppo")
"""Stages that leave an actor for the next ones."""


def stage_folder(config: Config, stage: str) -> Path:
    """RUN/STAGE, made if it is not there."""
    return RunFolder.of(config).stage(stage).make().path


def packer_of(config: Config, world: Runtime) -> Packer:
    """How this rank's replica packs its share of a batch."""
    parallel = config.parallel
    multiple, segment_multiple = rounding(parallel, config.model)
    return Packer(parallel.tokens_per_microbatch, multiple, world.dp_rank, world.dp_size, segment_multiple)


def mark_done(folder: Path, checkpoint: Path | None = None, outputs: tuple[str, ...] = ()) -> None:
    """``StageFolder.mark_done`` of a stage's folder."""
    StageFolder(folder).mark_done(checkpoint, outputs)


def last_checkpoint(config: Config, stage: str, component: str) -> Path | None:
    """The component's folder in the final checkpoint of a finished earlier stage, None if it has not run."""
    return RunFolder.of(config).stage(stage).last_checkpoint(component)


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
