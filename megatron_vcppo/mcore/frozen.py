"""Parameters that are not trained: neither the optimizer nor the gradient buffers of a ``Learner`` have them."""

from collections.abc import Collection

from megatron_vcppo.mcore.hf_weights_io import EMBEDDING, local_parameters
from megatron_vcppo.mcore.lora import ask_for_gradients
from megatron_vcppo.mcore.model import PackedGPT


def freeze(model: PackedGPT, names: Collection[str]) -> None:
    """Freeze this rank's parameters of these names of the conversion table; before a Learner is made of the model."""
    for parameter, entry in local_parameters(model):
        if entry.name in names:
            parameter.requires_grad_(False)
    if model.pre_process and EMBEDDING in names:
        model.embedding.register_forward_hook(ask_for_gradients)
