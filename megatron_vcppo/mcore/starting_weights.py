"""A model's first weights, from wherever they are: a Hugging Face folder, or a component of a training checkpoint.

A component has either all weights or adapters and a pointer to the base below them. A model with adapters takes both:
of the first it makes the base of new adapters.
"""

from pathlib import Path

from megatron_vcppo.config import LoraConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapter_base import base_of_checkpoint, base_of_hf, locate
from megatron_vcppo.hf.adapters import BaseWeights, StoredAdapters
from megatron_vcppo.hf.convert.folders import is_megatron_lm
from megatron_vcppo.mcore.checkpoint import load_adapters, load_model
from megatron_vcppo.mcore.hf_weights_io import load_base, load_hf
from megatron_vcppo.mcore.lora import share_base
from megatron_vcppo.mcore.model import HEAD, PackedGPT
from megatron_vcppo.run.manifest import read_manifest


def stored_adapters(folder: Path) -> StoredAdapters | None:
    """Those of a component; None if it has all weights."""
    return StoredAdapters.of_manifest(folder, read_manifest(folder)["meta"])


def lora_of(folder: Path) -> LoraConfig:
    """``model.lora`` of a model that is to hold a component exactly."""
    stored = stored_adapters(folder)
    return stored.lora if stored is not None else LoraConfig()


def load_from_hf(model: PackedGPT, hf: Path, owner: PackedGPT | None = None) -> None:
    """The weights of a Hugging Face folder, or of a checkpoint of Megatron-LM; a critic keeps its head.

    Adapters are new. owner: a model whose base is shared if it is the same. Raises UserError for adapters on weights of
    Megatron-LM.
    """
    if model.adapters is None:
        load_base(model, hf)
    elif is_megatron_lm(hf):
        raise UserError(
            f"{hf}: adapters (model.lora) take a Hugging Face folder, not a checkpoint of Megatron-LM: train a step "
            "without adapters from it, export that, and make the result model.hf"
        )
    else:
        model.adapters.reset()
        _load_base(model, base_of_hf(hf), hf, owner)


def load_component(
    model: PackedGPT, folder: Path, hf: Path | None, *, without_head: bool = False, owner: PackedGPT | None = None
) -> None:
    """The weights of a component. Raises UserError if its adapters are others than the model's, or their base is gone.

    Args:
        hf: model.hf, where a base may be that was elsewhere; None: not known.
        without_head: an actor's component, for a critic, which keeps its head.
        owner: as in ``load_from_hf``.
    """
    head = HEAD if without_head else None
    stored = stored_adapters(folder)
    if model.adapters is None:
        if stored is not None:
            stored.check_settings(folder, LoraConfig())
        load_model(model, folder, without=head)
    elif stored is None:
        model.adapters.reset()
        _load_base(model, base_of_checkpoint(folder), folder, owner, head)
    else:
        stored.check_settings(folder, model.adapters.settings)
        _load_base(model, stored.base, locate(stored.base, folder, hf), owner, HEAD)
        load_adapters(model, folder, without=head)
        model.adapters.is_new = False


def _load_base(
    model: PackedGPT, base: BaseWeights, folder: Path, owner: PackedGPT | None, without: str | None = HEAD
) -> None:
    """Unless the model has it. What an owner lacks, such as an output layer, is loaded; the rest then gets the values
    that it has."""
    if model.base is not None and model.base.fingerprint == base.fingerprint:
        return
    is_owners = owner is not None and owner.base is not None and owner.base.fingerprint == base.fingerprint
    if owner is not None and is_owners and share_base(model, owner):
        pass
    elif base.kind == "hf":
        load_hf(model, folder)
    else:
        load_model(model, folder, without=without)
    model.base = base
