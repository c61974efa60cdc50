"""Parameters that are not trained: neither the optimizer nor the gradient buffers of a ``Learner`` have them."""

from collections.abc import Collection

from megatron_vcppo.mcore.hf_weights_io import local_parameters
from megatron_vcppo.mcore.model import PackedGPT


def freeze(model: PackedGPT, names: Collection[str]) -> None:
    """Freeze this rank's parameters of these names of the conversion table; before a Learner is made of the model."""
    for parameter, entry in local_parameters(model):
        if entry.name in names:
            parameter.requires_grad_(False)
