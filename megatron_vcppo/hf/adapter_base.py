"""The weights below adapters: their fingerprint, and where they are now."""

import hashlib
from pathlib import Path

import numpy as np

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import BaseWeights
from megatron_vcppo.hf.safetensors_files import read_folder
from megatron_vcppo.run.files import read_bytes
from megatron_vcppo.run.manifest import MANIFEST_NAME

SAMPLED_BYTES = 4096
"""Of each tensor of a Hugging Face folder, from its start: training changes them all, and this is read in no time."""


def base_of_hf(folder: str | Path) -> BaseWeights:
    """A Hugging Face folder as a base. Raises UserError if its weights cannot be read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_folder(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        sample = min(SAMPLED_BYTES, tensor.num_bytes)
        digest.update(np.fromfile(tensor.path, np.uint8, sample, offset=tensor.offset).tobytes())
    return BaseWeights("hf", str(Path(folder).absolute()), digest.hexdigest())


def base_of_checkpoint(folder: Path) -> BaseWeights:
    """A component with all weights as a base: its manifest has the checksums of its files."""
    try:
        content = read_bytes(folder / MANIFEST_NAME)
    except OSError as error:
        raise UserError(f"{folder}: not a complete checkpoint: {error.strerror}") from None
    return BaseWeights("checkpoint", str(folder.absolute()), hashlib.sha256(content).hexdigest())


def locate(base: BaseWeights, component: Path, hf: Path | None) -> Path:
    """The folder that has these weights now: where they were, or hf, or in the run folder that was moved.

    component: whose base they are, RUN/STAGE/checkpoints/iter_N/NAME. hf: model.hf, if that is known. Raises UserError
    if no place has the same weights.
    """
    recorded = Path(base.path)
    tried: list[str] = []
    if base.kind == "hf":
        places = [hf or recorded, recorded]
    else:
        moved = component.absolute().parents[3:4]  # RUN
        places = [recorded, *(run / Path(*recorded.parts[-4:]) for run in moved)]
    for place in dict.fromkeys(places):
        try:
            found = base_of_hf(place) if base.kind == "hf" else base_of_checkpoint(place)
            if found.fingerprint == base.fingerprint:
                return place
            tried.append(f"{place} has other weights")
        except UserError as error:
            tried.append(str(error).partition("\n")[0])
    raise UserError(f"{component}: its adapters belong to the weights that were in {recorded}: {'; '.join(tried)}")
