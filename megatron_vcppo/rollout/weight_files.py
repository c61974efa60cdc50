"""The weights of a push as safetensors files in a folder, with checksums on request."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vcppo.rollout.checksum import checksum, compare
from megatron_vcppo.run.files import replacing

CHECKSUMS = "checksums"
"""Key in a file's metadata: name → checksum, as JSON."""


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], verify: bool) -> None:
    """Put a file of contiguous CPU tensors in place; verify: with checksums, which ``read_folder`` compares."""
    sums = {CHECKSUMS: json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})} if verify else None
    with replacing(path, durable=False) as temporary:
        save_file(dict(tensors), temporary, sums)


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, in its shape in the Hugging Face format, from the safetensors files of a folder.

    Raises RuntimeError with the name of a tensor that is not what the checksum in its file says.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            sums = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name)
                compare(name, tensor, sums.get(name))
                yield name, tensor
