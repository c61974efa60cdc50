"""The models a stage starts from: the actor that earlier stages left, and a critic by its ``init``."""

from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.folders import is_megatron_lm
from megatron_vcppo.hf.frozen import frozen_names, frozen_patterns
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import load_learner
from megatron_vcppo.mcore.checkpoint_state import adam_steps, reset_moments
from megatron_vcppo.mcore.frozen import freeze
from megatron_vcppo.mcore.learner import Critic
from megatron_vcppo.mcore.model import ActorModel, CriticModel, PackedGPT, build_actor, build_critic
from megatron_vcppo.mcore.starting_weights import load_component, load_from_hf, stored_adapters
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.stages.stage import actor_before


def starting_actor(config: Config, stage: str, critic: CriticModel | None = None) -> ActorModel:
    """The actor with the weights of the newest actor stage before this one, or of model.hf.

    critic: whose base is shared, if both have adapters and the same base.
    """
    hf = Path(config.model.hf)
    model = build_actor(Architecture.from_hf(hf), config.model, config.parallel)
    checkpoint = actor_before(config, stage)
    if checkpoint is None:
        load_from_hf(model, Path(config.model.base), owner=critic)
    else:
        load_component(model, checkpoint, hf, owner=critic)
    _say_base(stage, model, critic)
    return model


def starting_critic(
    config: Config, stage: str, init: str, checkpoint_path: str | None, actor: ActorModel | None = None
) -> CriticModel:
    """A critic: the trunk and head of an earlier critic, or an actor's trunk with a new head; frozen as configured.

    actor: whose base is shared, if both have adapters and the same base. Raises UserError if what ``init`` names is not
    there or is another model, or if a pattern of frozen parameters does not fit the model.
    """
    hf = Path(config.model.hf)
    arch = Architecture.from_hf(hf)
    model = build_critic(arch, config.model, config.parallel)
    key, patterns = frozen_patterns(config, stage)
    freeze(model, frozen_names(arch, patterns, key, config.parallel.pp))
    trunk = actor_before(config, stage) if init == "sft" else None
    if init in ("value_pretrain", "reward_model", "checkpoint"):
        folder = _critic_folder(config, stage, init, checkpoint_path)
        if is_megatron_lm(folder):  # of a language model
            load_from_hf(model, folder)
            return model
        check_same_model(folder, arch)
        load_component(model, folder, hf, owner=actor)
    elif trunk is not None:
        load_component(model, trunk, hf, without_head=True, owner=actor)
    else:
        load_from_hf(model, Path(config.model.base), owner=actor)
    _say_base(stage, model, actor)
    return model


def _say_base(stage: str, model: PackedGPT, owner: PackedGPT | None) -> None:
    if owner is None or owner.base is None or model.base is None or not runtime.current().is_main:
        return
    is_shared = owner.base.fingerprint == model.base.fingerprint
    text = "actor and critic share one base" if is_shared else f"the {model.kind} has a base of its own"
    say(f"{stage}: {text}: {model.base.path}")


def continue_pretraining(critic: Critic, config: Config) -> None:
    """Give PPO's critic the optimizer state of its value pretraining, if it comes from there; its schedule is new.

    With ``ppo.critic.moments: reset`` only the main weights in float32, and moments of zero.
    """
    settings = config.ppo.critic
    if settings.init not in ("value_pretrain", "checkpoint"):
        return
    folder = _critic_folder(config, "ppo", settings.init, settings.checkpoint_path)
    if is_megatron_lm(folder):
        return
    if critic.model.adapters is not None and stored_adapters(folder) is None:
        if critic.runtime.is_main:
            say(f"ppo: Adam's moments of the critic start at zero: its adapters are new, {folder} has none")
        return
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
