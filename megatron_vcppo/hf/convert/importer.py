"""A Hugging Face folder to a Megatron checkpoint, as tp × pp ranks would have saved it. One process, no model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_vcppo.data.vocabulary import check_vocabulary
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert import conversion_plan
from megatron_vcppo.hf.convert.copying import Job, Matrix, Progress, scatter
from megatron_vcppo.hf.convert.dist_format import write_frame
from megatron_vcppo.hf.convert.folders import copy_small_files, new_folder
from megatron_vcppo.hf.mapping import Parameter, checkpoint_place, parameters
from megatron_vcppo.hf.safetensors_files import TensorInFile, model_tensors
from megatron_vcppo.run.manifest import write_manifest


def import_hf(hf: Path, out: Path, tp: int, pp: int, progress: Progress | None = None) -> Architecture:
    """Write a weights-only checkpoint of the model in ``hf`` to the new folder ``out``; the dtypes stay as they are.

    Raises UserError if the model is not supported, weights or tokenizer do not match config.json, or ``out`` is in use.
    """
    hf, out = Path(hf), Path(out)
    arch = Architecture.from_hf(hf)
    check_vocabulary(hf)
    arch.check_parallel(tp, pp)
    tensors = model_tensors(hf, arch)
    table = parameters(arch, tp)
    dtypes = _dtypes(hf, arch, table, tensors)
    total_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(out, needed_bytes=total_bytes) as folder:
        copy_small_files(hf, folder / "hf")
        planned = [conversion_plan.new_chunks(parameter, dtypes[parameter.name], arch, tp, pp) for parameter in table]
        written = iter(write_frame(folder, [chunk for chunks in planned for chunk in chunks]))

        def jobs() -> Iterator[Job]:
            for parameter, chunks in zip(table, planned, strict=True):
                places = [next(written) for _ in chunks]
                wide = {
                    name: Matrix(tensors[name].path, tensors[name].offset, tensors[name].row_bytes)
                    for name in parameter.hf_names
                }
                yield from conversion_plan.jobs(parameter, places, dtypes[parameter.name].itemsize, wide)

        scatter(jobs(), total_bytes, progress)
        meta = {
            "kind": "actor",
            "architecture": arch.to_dict(),
            "dtype": arch.dtype,
            "tp": tp,
            "pp": pp,
            "iteration": 0,
        }
        write_manifest(folder, meta)
    return arch


def _dtypes(
    hf: Path, arch: Architecture, table: list[Parameter], tensors: dict[str, TensorInFile]
) -> dict[str, torch.dtype]:
    """Each parameter's dtype. Layers are stacked under one key of the checkpoint, which has one dtype."""
    per_key: dict[str, dict[torch.dtype, str]] = {}
    for parameter in table:
        seen = per_key.setdefault(checkpoint_place(parameter.name, arch).key, {})
        seen.update({tensors[name].dtype: name for name in parameter.hf_names})
    problems = [seen for seen in per_key.values() if len(seen) > 1]
    if problems:
        lines = ("  " + ", ".join(f"{name} is {dtype}" for dtype, name in seen.items()) for seen in problems)
        raise UserError(f"{hf}: tensors that Megatron stacks have different dtypes:\n" + "\n".join(lines))
    return {parameter.name: next(iter(per_key[checkpoint_place(parameter.name, arch).key])) for parameter in table}
