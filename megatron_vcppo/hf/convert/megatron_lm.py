"""Weights of a GPT from a checkpoint that Megatron-LM, or anything else with Megatron-Core, saved as torch_dist.

Its keys are those of our checkpoints: Megatron-Core names them. What differs is around them: the folder of iterations,
an optimizer's and other state next to the weights, layers under one key each (where Megatron-LM saved them so), and a
vocabulary with other padding. Only the bytes of weights are read: ``common.pt`` and objects (arguments, random state),
which are pickles, are never opened.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.dist_format import GlobalTensor, read_model
from megatron_vcppo.hf.convert.folders import iteration_folder
from megatron_vcppo.hf.mapping import VOCABULARY, Parameter, checkpoint_place, layer_of

OPTIMIZERS = ("optimizer.", "chained_")
"""What the keys of an optimizer's state begin with."""
_LAYERS = "decoder.layers."
_SHOWN = 4


class MegatronLmWeights:
    """The tensors of one checkpoint that a model's table asks for."""

    def __init__(self, folder: Path, table: list[Parameter], arch: Architecture, kind: str) -> None:
        """kind: of the model, actor or critic; a critic's trunk needs no output layer.

        Raises UserError, in one line, if the folder is no such checkpoint, or its tensors are not those of the table.
        """
        self.folder = iteration_folder(folder)
        stored = read_model(self.folder, OPTIMIZERS)
        if kind == "critic":
            stored.pop("output_layer.weight", None)
            table = [parameter for parameter in table if not parameter.name.startswith("value_head.")]
        self.found = self._match(table, arch, stored)

    def load(self, parameter: Parameter) -> torch.Tensor:
        """A whole parameter, of ``parameter.shape``, in the type that is stored; rows of padding may hold anything."""
        tensor, num_dims = self.found[parameter.name], len(parameter.shape)
        full = torch.zeros(parameter.shape, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            offsets, sizes = chunk.offsets[-num_dims:], chunk.sizes[-num_dims:]
            rows = min(sizes[0], parameter.shape[0] - offsets[0])  # less: padding that this layout has not
            if rows <= 0:
                continue
            num_bytes = math.prod(sizes) * tensor.dtype.itemsize
            try:
                data = np.memmap(chunk.path, np.uint8, "c", chunk.data_offset, (num_bytes,))
            except (OSError, ValueError) as error:
                raise UserError(f"{chunk.path}: cannot be read: {error}") from None
            piece = torch.from_numpy(data).view(tensor.dtype).view(sizes)[:rows]
            box = (slice(offsets[0], offsets[0] + rows), *map(_span, offsets[1:], sizes[1:]))
            full[box] = piece
        return full

    def _match(
        self, table: list[Parameter], arch: Architecture, stored: Mapping[str, GlobalTensor]
    ) -> dict[str, GlobalTensor]:
        """The tensor of each parameter by its name, with the chunks of its layer."""
        found: dict[str, GlobalTensor] = {}
        problems, used = [], set()
        for parameter in table:
            place, layer = checkpoint_place(parameter.name, arch), layer_of(parameter.name)
            key, stack, index = place.key, place.stack, place.index
            if layer is not None and key not in stored:  # each layer has a key
                key, stack, index = key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1), stack[1:], index[1:]
            used.add(key)
            if key not in stored:
                problems.append(f"missing {key}")
                continue
            tensor = stored[key]
            shape = (*stack, *parameter.shape)
            if not _fits(tensor.shape, shape, parameter):
                problems.append(f"{key} is {list(tensor.shape)}, should be {list(shape)}")
                continue
            chunks = tuple(chunk for chunk in tensor.chunks if chunk.offsets[: len(stack)] == index)
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(tensor.shape[-len(parameter.shape) :]):
                problems.append(f"{key} is incomplete")
            found[parameter.name] = replace(tensor, chunks=chunks)
        problems += [f"unexpected {key}" for key in stored if key not in used]
        if problems:
            distinct = list(dict.fromkeys(problems))
            more = f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
            raise UserError(f"{self.folder}: is not the model of model.hf: {'; '.join(distinct[:_SHOWN])}{more}")
        return found


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...], parameter: Parameter) -> bool:
    """Whether a tensor can be the parameter: a vocabulary's may have any number of rows of padding."""
    if parameter.name in VOCABULARY:
        return stored[1:] == wanted[1:] and stored[0] >= parameter.blocks[0].num_rows
    return stored == wanted


def _span(offset: int, size: int) -> slice:
    return slice(offset, offset + size)
