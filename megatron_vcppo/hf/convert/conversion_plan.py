"""Which bytes go where: a Megatron parameter's chunks against the Hugging Face tensors it is made of."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.copying import Job, Matrix, Strip
from megatron_vcppo.hf.convert.dist_format import Chunk, NewChunk
from megatron_vcppo.hf.mapping import Parameter, checkpoint_place, pipeline_stage
from megatron_vcppo.hf.pipeline import stage_layers


def new_chunks(parameter: Parameter, dtype: torch.dtype, arch: Architecture, tp: int, pp: int) -> list[NewChunk]:
    """The chunks that tp × pp ranks would save of a parameter, each in its own rank's file."""
    place = checkpoint_place(parameter.name, arch)
    dim, parts = parameter.split_dim, parameter.num_parts
    first_rank = pipeline_stage(parameter.name, stage_layers(arch.num_layers, pp)) * tp
    chunks = []
    for tp_rank in range(tp if dim is not None else 1):
        for part in range(parts):
            offsets, sizes = [0] * len(parameter.shape), list(parameter.shape)
            if dim is not None:
                sizes[dim] //= parts * tp
                offsets[dim] = (part * tp + tp_rank) * sizes[dim]
            chunks.append(
                NewChunk(
                    key=place.key,
                    shape=(*place.stack, *parameter.shape),
                    dtype=dtype,
                    offsets=(*place.index, *offsets),
                    sizes=(*(1 for _ in place.stack), *sizes),
                    file_name=f"__{first_rank + tp_rank}_0.distcp",
                )
            )
    return chunks


def jobs(parameter: Parameter, chunks: Sequence[Chunk], itemsize: int, wide: Mapping[str, Matrix]) -> Iterator[Job]:
    """The copies between a parameter's chunks (any layout) and its Hugging Face tensors.

    ``itemsize``: bytes of an element in the chunks. Raises AssertionError if the chunks do not cover a tensor exactly.
    """
    boxes = [_Box(chunk, len(parameter.shape), itemsize) for chunk in chunks]
    row_bytes = itemsize * (parameter.shape[1] if len(parameter.shape) > 1 else 1)
    bounds = sorted({row for box in boxes for row in (box.start, box.stop)})
    for block in parameter.blocks:
        stop = block.row + block.num_rows
        cuts = [block.row, *(row for row in bounds if block.row < row < stop), stop]
        for start, end in pairwise(cuts):
            strips = tuple(
                Strip(box.matrix, start - box.start, box.column) for box in boxes if box.start <= start < box.stop
            )
            covered = sum(strip.matrix.row_bytes for strip in strips)
            assert covered == row_bytes, f"{parameter.name}: rows {start} to {end}: {covered} of {row_bytes} bytes"
            yield Job(wide[block.hf_name], block.hf_row + start - block.row, end - start, strips)


class _Box:
    """A chunk as rows [start, stop) and byte columns from ``column`` on of one (layer's) parameter."""

    def __init__(self, chunk: Chunk, num_dims: int, itemsize: int) -> None:
        offsets, sizes = chunk.offsets[-num_dims:], chunk.sizes[-num_dims:]
        self.start, self.stop = offsets[0], offsets[0] + sizes[0]
        self.column = offsets[1] * itemsize if num_dims > 1 else 0
        width = sizes[1] * itemsize if num_dims > 1 else itemsize
        self.matrix = Matrix(chunk.path, chunk.data_offset, width)
