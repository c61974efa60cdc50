"""What a configuration's neural reward model is made of, and whether its checkpoint is one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from megatron_vcppo.config import Config
from megatron_vcppo.data.vocabulary import read_vocabulary
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture

T = TypeVar("T")
REWARDED = ("value_pretrain", "ppo")
"""Stages whose rewards a model may give."""
HEAD = "score.weight"
OTHER_TOKENIZER = (
    "{folder}: its tokenizer is not that of model.hf: set rewards.model.input=chat, which reads the text of prompt and "
    "response with the reward model's tokenizer"
)


def uses_reward_model(config: Config, stage: str) -> bool:
    """Whether a model rewards the responses of this stage."""
    model = config.rewards.model
    return stage in REWARDED and (model.path is not None or model.stage is not None)


def reward_architecture(config: Config, policy: Architecture) -> Architecture:
    """Of the reward model: its folder's, or the policy's for the one of a stage. Raises UserError with the key."""
    path = config.rewards.model.path
    return policy if path is None else under_path_key(lambda: Architecture.from_hf(path))


def check_reward_model(config: Config) -> None:
    """Raise UserError if rewards.model.path is no reward model, cannot be split as configured, or cannot read what the
    policy writes, as far as its config.json, vocabulary and head tell: no torch, so that a login node can check.

    Loading it checks every tensor (``safetensors_files.reward_model_tensors``).
    """
    path = config.rewards.model.path
    if path is None:
        return

    def check(folder: Path) -> None:
        arch = Architecture.from_hf(folder)
        check_head(folder, _shape_of_head(folder))
        parallel = config.parallel
        ep = parallel.ep if arch.experts else 1
        arch.check_parallel(parallel.tp, parallel.pp, ep, parallel.sequence_parallel, parallel.ends)
        if config.rewards.model.input == "tokens":
            arch.check_length(config.model.max_length)
            own, policys = (_tokens(other) for other in (folder, Path(config.model.hf)))
            if own and policys and own != policys:
                raise UserError(OTHER_TOKENIZER.format(folder=folder))

    under_path_key(lambda: check(Path(path)))


def check_head(folder: Path, shape: Sequence[int] | None) -> None:
    """Raise UserError if the head, of this shape (None: there is none), does not give one number."""
    if shape is None:
        raise UserError(f"{folder}: has no {HEAD}: it is not a checkpoint for sequence classification")
    if shape[0] != 1:
        raise UserError(f"{folder}: {HEAD} has {shape[0]} labels, a reward model has one")


def _shape_of_head(folder: Path) -> list[int] | None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                if HEAD in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    return list(tensors.get_slice(HEAD).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
    return None


def _tokens(folder: Path) -> dict[str, int]:
    vocabulary = read_vocabulary(folder)
    return vocabulary.base | vocabulary.added


def under_path_key(run: Callable[[], T]) -> T:
    """What ``run`` returns; its UserError with the key of the folder in front."""
    try:
        return run()
    except UserError as error:
        raise UserError(f"rewards.model.path: {error}") from None
