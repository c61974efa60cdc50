"""The weights of a Hugging Face folder, checked against its config.json before any of them is read."""

from pathlib import Path

import numpy as np

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.mapping import hf_shapes, parameters
from megatron_vcppo.hf.safetensors_files import TensorInFile, check_shapes, read_folder

_OUTPUT_LAYER = "lm_head.weight"
_HEADS = {_OUTPUT_LAYER, "score.weight", "score.bias"}


def model_tensors(folder: Path, arch: Architecture, trunk_only: bool = False) -> dict[str, TensorInFile]:
    """Where each tensor of the model is stored, in the order of the mapping table.

    trunk_only: without the output layer, for a critic, which has its own head; the folder's head is ignored. Raises
    UserError that lists every missing, unexpected, misshaped, damaged or truncated tensor or file.
    """
    tensors = read_folder(folder)
    expected = hf_shapes(parameters(arch))
    ignored = {name for name in tensors if name.endswith(".rotary_emb.inv_freq")}  # buffers of old versions
    has_copy = arch.tied and _OUTPUT_LAYER in tensors
    if trunk_only:
        expected.pop(_OUTPUT_LAYER, None)
        ignored |= _HEADS
    elif has_copy:
        ignored.add(_OUTPUT_LAYER)
    check_shapes(folder, tensors, expected, ignored)
    if has_copy and not trunk_only:
        _check_copy(folder, tensors["model.embed_tokens.weight"], tensors[_OUTPUT_LAYER])
    return {name: tensors[name] for name in expected}


def _check_copy(folder: Path, embedding: TensorInFile, output_layer: TensorInFile) -> None:
    """A tied model's output layer may be stored next to the embedding, as long as it is the same."""
    if not np.array_equal(_bytes(embedding), _bytes(output_layer)):
        raise UserError(
            f"{folder}: config.json ties the output layer to the embedding, but {_OUTPUT_LAYER} differs from it; "
            "set tie_word_embeddings to false or remove the tensor"
        )


def _bytes(tensor: TensorInFile) -> np.ndarray:
    return np.memmap(tensor.path, np.uint8, "r", tensor.offset, tensor.num_bytes)
