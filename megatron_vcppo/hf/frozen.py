"""Which parameters of a critic stay as they are: patterns over Hugging Face names, resolved by the conversion table."""

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import prod

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture

HEAD, EMBEDDING = "value_head.", "embedding.word_embeddings.weight"


def frozen_patterns(config: Config, stage: str) -> tuple[str, list[str]]:
    """The key of a stage's patterns, and the patterns; none for stages that train no critic with such a key."""
    return {
        "value_pretrain": ("value_pretrain.frozen", config.value_pretrain.frozen),
        "ppo": ("ppo.critic.frozen", config.ppo.critic.frozen),
    }.get(stage, ("", []))


def frozen_names(arch: Architecture, patterns: Sequence[str], key: str, pp: int = 1) -> frozenset[str]:
    """Names in the conversion table of the critic's parameters that ``patterns`` freeze.

    A pattern is a shell pattern over names such as ``model.layers.0.self_attn.q_proj.weight``; the value head is always
    trained. Raises UserError, which names ``key``, for a pattern without a match; for one that takes a part of what is
    one parameter in Megatron (queries, keys and values; gate and up), or a parameter in some layers only, because
    checkpoints stack layers; and if a pipeline stage is left without anything to train.
    """
    if not patterns:
        return frozenset()
    from megatron_vcppo.hf.mapping import checkpoint_place, parameters  # torch, which a login node may lack

    table = [entry for entry in parameters(arch, kind="critic") if not entry.name.startswith(HEAD)]
    every = {name for entry in table for name in entry.hf_names}
    matched: set[str] = set()
    for pattern in patterns:
        if not (found := {name for name in every if fnmatchcase(name, pattern)}):
            raise UserError(
                f"{key}: no parameter matches {pattern!r}: patterns are over Hugging Face names, such as "
                "*.self_attn.* for model.layers.0.self_attn.q_proj.weight"
            )
        matched |= found
    layers: dict[str, set[bool]] = defaultdict(set)
    frozen = set()
    for entry in table:
        taken = [name for name in entry.hf_names if name in matched]
        if taken and len(taken) < len(entry.hf_names):
            left = next(name for name in entry.hf_names if name not in matched)
            raise UserError(f"{key}: {taken[0]} is frozen and {left} is not, but they are trained as one: freeze both")
        if taken:
            frozen.add(entry.name)
        layers[checkpoint_place(entry.name, arch).key].add(bool(taken))
        if len(layers[checkpoint_place(entry.name, arch).key]) == 2:
            raise UserError(f"{key}: {entry.hf_names[0]} is frozen in some layers only: freeze it in all of them")
    if pp > 1 and not any(True not in layers[name] for name in layers if name.startswith("decoder.layers.")):
        raise UserError(f"{key}: nothing is left to train in the layers, which parallel.pp {pp} needs: freeze less")
    return frozenset(frozen)


def frozen_counts(arch: Architecture, patterns: Sequence[str], key: str, pp: int = 1) -> tuple[int, int, int]:
    """Parameters that are frozen: (of all layers without experts, of experts, of the embedding). Raises UserError as
    ``frozen_names``."""
    names = frozen_names(arch, patterns, key, pp)
    if not names:
        return 0, 0, 0
    from megatron_vcppo.hf.mapping import parameters

    layers = experts = embedding = 0
    for entry in parameters(arch, kind="critic"):
        if entry.name not in names:
            continue
        if entry.name == EMBEDDING:
            embedding = arch.vocab_size * arch.hidden_size
        elif entry.expert is not None:
            experts += prod(entry.shape)
        elif entry.name.startswith("decoder.layers."):
            layers += prod(entry.shape)
    return layers, experts, embedding
