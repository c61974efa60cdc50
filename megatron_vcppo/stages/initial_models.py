"""The models a stage starts from: the actor that earlier stages left, and a critic by its ``init``."""

from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_names, frozen_patterns
from megatron_vcppo.mcore.checkpoint import load_learner, load_model
from megatron_vcppo.mcore.checkpoint_state import adam_steps, reset_moments
from megatron_vcppo.mcore.frozen import freeze
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Critic
from megatron_vcppo.mcore.model import ActorModel, CriticModel, build_actor, build_critic
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.stages.stage import actor_before

HEAD = "value_head."


def starting_actor(config: Config, stage: str) -> ActorModel:
    """The actor with the weights of the newest actor stage before this one, or of model.hf."""
    arch = Architecture.from_hf(config.model.hf)
    model = build_actor(arch, config.model, config.parallel)
    checkpoint = actor_before(config, stage)
    if checkpoint is None:
        load_hf(model, config.model.hf)
    else:
        load_model(model, checkpoint)
    return model


def starting_critic(config: Config, stage: str, init: str, checkpoint_path: str | None) -> CriticModel:
    """A critic: the trunk and head of an earlier critic, or an actor's trunk with a new head; frozen as configured.

    Raises UserError if what ``init`` names is not there or is another model, or if a pattern of frozen parameters does
    not fit the model.
    """
    arch = Architecture.from_hf(config.model.hf)
    model = build_critic(arch, config.model, config.parallel)
    key, patterns = frozen_patterns(config, stage)
    freeze(model, frozen_names(arch, patterns, key, config.parallel.pp))
    if init in ("value_pretrain", "reward_model", "checkpoint"):
        folder = _critic_folder(config, stage, init, checkpoint_path)
        check_same_model(folder, arch)
        load_model(model, folder)
        return model
    trunk = actor_before(config, stage) if init == "sft" else None
    if trunk is None:
        load_hf(model, config.model.hf)
    else:
        load_model(model, trunk, without=HEAD)
    return model


def continue_pretraining(critic: Critic, config: Config) -> None:
    """Give PPO's critic the optimizer state of its value pretraining, if it comes from there; its schedule is new.

    With ``ppo.critic.moments: reset`` only the main weights in float32, and moments of zero.
    """
    settings = config.ppo.critic
    if settings.init not in ("value_pretrain", "checkpoint"):
        return
    folder = _critic_folder(config, "ppo", settings.init, settings.checkpoint_path)
    load_learner(critic, folder, weights=False)  # starting_critic loaded them
    critic.optimizer_steps = 0
    text = f"continue after {adam_steps(critic.optimizer)} steps of {folder}"
    if settings.moments == "reset":
        reset_moments(critic.optimizer)
        text = "start at zero"
    if critic.runtime.is_main:
        say(f"ppo: Adam's moments of the critic {text} (ppo.critic.moments {settings.moments})")


def _critic_folder(config: Config, stage: str, init: str, checkpoint_path: str | None) -> Path:
    folder = Path(checkpoint_path) if init == "checkpoint" and checkpoint_path else None
    folder = folder or RunFolder.of(config).stage(init).last_checkpoint("critic")
    if folder is None:
        where = "its checkpoint_path is not set" if init == "checkpoint" else "that stage is not done"
        raise UserError(f"stage {stage}: the critic is to come from {init}, but {where}")
    return folder


def check_same_model(folder: Path, arch: Architecture) -> None:
    """Raise UserError if a component's folder holds no critic, or one of another architecture."""
    meta = read_manifest(folder)["meta"]
    if meta.get("kind") != "critic":
        raise UserError(f"{folder}: holds {meta.get('kind')!r}, not a critic")
    if differences := Architecture.of_manifest(folder, meta).differences(arch):
        raise UserError(f"{folder}: the critic is another model than model.hf: {differences}")
