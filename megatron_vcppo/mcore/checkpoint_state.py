"""What a rank writes to a checkpoint and reads from one: boxes of the parameters' global tensors.

Every rank handles the ranges of parameters that its optimizer owns (all of each parameter with the plain optimizer, a
part of the flat gradient buffer with the distributed one) and nothing else: no rank gathers the state of others. A
range of a row-major tensor is a few boxes, and the format stores boxes, so a checkpoint does not know which optimizer
or layout wrote it, and any other reads the boxes that overlap its own.

Keys: ``KEY`` (the weight, in the model's dtype) and ``optimizer.state.{exp_avg,exp_avg_sq,param}.KEY`` (float32; the
main parameter only where the weight is not float32 itself). Loads copy into the tensors that are there.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_vcppo.integers import ceil_div
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.mcore.model import PackedGPT
from megatron_vcppo.mcore.optimizer import chained_optimizers

_STATE = "optimizer.state"
_MAIN_NAMES = ("param", "fp32_param")
"""Of main parameters; the second in checkpoints that Megatron's plain optimizer wrote."""


@dataclass(frozen=True)
class OwnedRange:
    """What this rank's optimizer owns of a parameter: its flat elements from ``start`` on."""

    parameter: torch.nn.Parameter
    start: int
    weight: Tensor
    """[n], a view into the parameter."""
    state: Mapping[str, Tensor]
    """exp_avg, exp_avg_sq and, where it is not the weight itself, param: [n], float32; the optimizer's own."""
    is_shared: bool
    """Whether data-parallel ranks own different ranges; otherwise all own the same ones."""


@dataclass(frozen=True)
class _Shard:
    """A parameter's place in its global tensor: pieces (without data), each a row-major part of it from an index on."""

    key: str
    pieces: Sequence[tuple[ShardedTensor, int]]


def tensors_to_save(learner: Learner) -> dict[str, ShardedTensor]:
    """The weights and the optimizer state that this rank owns.

    Of a frozen parameter there is the weight alone, which the first data-parallel rank writes; of the base below
    adapters nothing.
    """
    shards = _shards(learner)
    boxes: list[ShardedTensor] = []
    for parameter in _stored(learner.model):
        if not parameter.requires_grad:
            shard = shards[id(parameter)]
            boxes += _boxes(shard, shard.key, parameter.detach().view(-1))
    for owned in owned_ranges(learner.optimizer):
        shard = shards[id(owned.parameter)]
        boxes += _boxes(shard, shard.key, owned.weight, owned)
        for name, tensor in owned.state.items():
            boxes += _boxes(shard, f"{_STATE}.{name}.{shard.key}", tensor, owned)
    return _numbered(boxes)


def tensors_to_load(learner: Learner, stored: Collection[str], weights: bool = True) -> dict[str, ShardedTensor]:
    """All of this rank's weights, unless they are there, and the optimizer state that it owns.

    stored: the checkpoint's keys, of which the best are taken. Moments that it lacks, of parameters that were frozen
    when it was saved, start at zero.
    """
    shards = _shards(learner)
    boxes: list[ShardedTensor] = []
    for parameter in _stored(learner.model) if weights else ():
        shard = shards[id(parameter)]
        key = _main_key(shard.key, stored) if parameter.dtype == torch.float32 else shard.key
        boxes += _boxes(shard, key, parameter.detach().view(-1))
    for owned in owned_ranges(learner.optimizer):
        shard = shards[id(owned.parameter)]
        for name, tensor in owned.state.items():
            key = _main_key(shard.key, stored) if name == "param" else f"{_STATE}.{name}.{shard.key}"
            if name != "param" and key not in stored and shard.key in stored:
                tensor.zero_()
                continue
            boxes += _boxes(shard, key, tensor, owned)
    return _numbered(boxes)


def _stored(model: PackedGPT) -> Iterator[torch.nn.Parameter]:
    """The parameters that a checkpoint has."""
    return (parameter for name, parameter in model.named_parameters() if model.is_stored(name))


def owned_ranges(optimizer: MegatronOptimizer) -> Iterator[OwnedRange]:
    """Every parameter, or part of one, that this rank's optimizer steps."""
    for one in chained_optimizers(optimizer):
        if isinstance(one, DistributedOptimizer):
            for parameter in one.model_param_group_index_map:
                found = one._get_model_param_range_map(parameter)["param"]
                state = one._get_main_param_and_optimizer_states(parameter)
                main = state.pop("param")
                yield _owned(parameter, found.start, main, state, is_shared=True)
            continue
        mains = {}
        if isinstance(one, Float16OptimizerWithFloat16Params):
            groups = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
            mains = {id(main): model for pair in groups for model, main in zip(*pair, strict=True)}
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                yield _owned(mains.get(id(main), main), 0, main, one.optimizer.state[main], is_shared=False)


def adam_steps(optimizer: MegatronOptimizer) -> int:
    """How many steps Adam's moments have seen; the same for all parameters."""
    for inner in (one.optimizer for one in chained_optimizers(optimizer)):
        counts = [state["step"] for state in inner.state.values() if "step" in state]  # torch
        counts += [group["step"] for group in inner.param_groups if "step" in group]  # Transformer Engine, apex
        if counts:
            return int(max(counts))
    return 0


def set_adam_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Continue Adam's bias correction after ``steps`` steps, whichever Adam wrote or reads the checkpoint."""
    for inner in (one.optimizer for one in chained_optimizers(optimizer)):
        counted_per_parameter = False
        for state in inner.state.values():
            if "step" in state:
                state["step"].fill_(float(steps))
                counted_per_parameter = True
        if not counted_per_parameter:
            for group in inner.param_groups:
                group["step"] = steps


def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Adam as before its first step; main weights stay."""
    for owned in owned_ranges(optimizer):
        owned.state["exp_avg"].zero_()
        owned.state["exp_avg_sq"].zero_()
    set_adam_steps(optimizer, 0)


def stored_adam_steps(common: Mapping[str, Any]) -> int:
    """Adam's step count in a checkpoint's content besides tensors, also in the formats of Megatron's optimizers."""
    if "adam_steps" in common:
        return int(common["adam_steps"])
    inner = common["optimizer"].get("optimizer", common["optimizer"])
    # Megatron's plain optimizers omit a count of zero.
    counts = [inner.get("state", {}).get("common_step", 0), *(group.get("step", 0) for group in inner["param_groups"])]
    return int(max(counts))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that together are the flat elements [start, stop) of a row-major tensor, in order.

    At most 2 × dimensions - 1: a part of a row (itself split if rows have rows), whole rows, a part of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = ceil_div(start, row), stop // row  # whole rows
    if first > last:
        ends = [(last, start - last * row, stop - last * row)]
    else:
        ends = [(first - 1, start - (first - 1) * row, row), (last, 0, stop - last * row)]
    for index, begin, end in ends:
        if index == last and first < last:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        for offsets, sizes in boxes_of_range(shape[1:], begin, end):
            yield (index, *offsets), (1, *sizes)


def _boxes(shard: _Shard, key: str, tensor: Tensor, owned: OwnedRange | None = None) -> Iterator[ShardedTensor]:
    """The boxes of ``tensor``: the flat elements of the parameter that are owned, or all of them."""
    start = owned.start if owned else 0
    stop = start + tensor.numel()
    for piece, piece_start in shard.pieces:
        replica = piece.replica_id
        if owned and owned.is_shared:
            replica = (*replica[:-1], 0)
        begin, end = max(start, piece_start), min(stop, piece_start + math.prod(piece.local_shape))
        for offsets, sizes in boxes_of_range(piece.local_shape, begin - piece_start, end - piece_start):
            size = math.prod(sizes)
            local_shape = (1,) * piece.prepend_axis_num + sizes
            inner = (0,) * piece.prepend_axis_num + offsets
            yield replace(
                piece,
                key=key,
                data=tensor[begin - start : begin - start + size].view(local_shape),
                dtype=tensor.dtype,
                local_shape=local_shape,
                global_offset=tuple(a + b for a, b in zip(piece.global_offset, inner, strict=True)),
                axis_fragmentations=None,
                replica_id=replica,
                prepend_axis_num=0,
            )
            begin += size


def _shards(learner: Learner) -> dict[int, _Shard]:
    """By the parameter's id: its place in the global tensor, as Megatron describes it."""
    shards = {}
    for entry in learner.model.sharded_state_dict().values():
        # A factory splits a parameter whose global tensor is not one grid (gate and up projection in one).
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        parameter, base = entry.data, entry.data.storage_offset()
        assert all(piece.data.is_contiguous() for piece in pieces), f"{entry.key}: not pieces of a row-major tensor"
        places = tuple((piece.without_data(), piece.data.storage_offset() - base) for piece in pieces)
        shards[id(parameter)] = _Shard(entry.key, places)
    return shards


def _owned(parameter: Any, start: int, main: Tensor, state: Mapping[str, Tensor], is_shared: bool) -> OwnedRange:
    tensors = {name: state[name].detach().view(-1) for name in ("exp_avg", "exp_avg_sq")}
    if parameter.dtype != torch.float32:
        tensors["param"] = main.detach().view(-1)
    weight = parameter.detach().view(-1)[start : start + main.numel()]
    return OwnedRange(parameter, start, weight, tensors, is_shared)


def _main_key(key: str, stored: Collection[str]) -> str:
    """Where a checkpoint has the float32 value of a weight: in a main parameter, or in the weight itself."""
    names = (f"{_STATE}.{name}.{key}" for name in _MAIN_NAMES)
    return next((name for name in names if name in stored), key)


def _numbered(boxes: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(i): box for i, box in enumerate(boxes)}
