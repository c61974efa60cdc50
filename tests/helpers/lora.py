"""Actor and critic with adapters over a tiny model, which share its weights; what the ranks hold of the adapters."""

from pathlib import Path

import torch

from megatron_vcppo.config import (
    Dtype,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.lora import Adapter
from megatron_vcppo.mcore.model import PackedGPT, build_actor, build_critic
from megatron_vcppo.mcore.starting_weights import load_from_hf

RANK, ALPHA = 4, 8.0
LORA = LoraConfig(rank=RANK, alpha=ALPHA)


def start_with_adapters(
    hf: Path,
    parallel: ParallelConfig,
    lora: LoraConfig = LORA,
    dtype: Dtype = "float32",
    clip_grad: float = 1.0,
    seed: int = 3,
) -> tuple[Actor, Critic]:
    """Learners whose adapters are new, on a process group that is started here."""
    runtime.start(parallel, seed=seed, timeout_s=60)
    arch, config = Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype=dtype, lora=lora)
    actor, critic = build_actor(arch, config, parallel), build_critic(arch, config, parallel)
    load_from_hf(actor, hf)
    load_from_hf(critic, hf, owner=actor)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=clip_grad)
    return (
        Actor(actor, parallel, optimizer, ScheduleConfig(), total_steps=10),
        Critic(critic, parallel, optimizer, ScheduleConfig(), total_steps=10),
    )


def adapters_by_name(model: PackedGPT) -> dict[str, Adapter]:
    """Those on this rank, by Hugging Face layer with its index in the whole model: "0.q_proj"."""
    found = {}
    for layer in model.decoder.layers:
        for name, adapter in layer.lora.named_children():
            found[f"{layer.layer_number - 1}.{name}"] = adapter
    return found


Part = tuple[torch.Tensor, int | None]
"""What a rank holds of a matrix, and the dimension along which tensor parallelism splits it."""


def parts_of(model: PackedGPT, gradients: bool = False) -> dict[str, Part]:
    """Matrices of this rank's adapters, or their gradients, such as "0.q_proj.lora_A"."""
    found: dict[str, Part] = {}
    for name, adapter in adapters_by_name(model).items():
        for matrix, parameter in adapter.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            value = parameter.main_grad if gradients else parameter.detach()
            found[f"{name}.{matrix}"] = (value.clone(), parameter.partition_dim if split else None)
    return found


def whole(ranks: list[dict[str, Part]], parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """The matrices of the whole model, from those of the first replica's ranks (tensor parallelism counts fastest)."""
    found = {}
    dp = parallel.dp or 1
    for pp_rank in range(parallel.pp):
        first = pp_rank * parallel.tp * dp * parallel.cp
        group = ranks[first : first + parallel.tp]
        for name, (part, dim) in group[0].items():
            found[name] = part if dim is None else torch.cat([rank[name][0] for rank in group], dim=dim)
    return found


def fill(model: PackedGPT, seed: int = 11) -> None:
    """Give B values of every adapter that do not depend on the layout."""
    for name, adapter in adapters_by_name(model).items():
        shape = (adapter.out_size, RANK)
        number = sum(map(ord, name)) + seed
        full = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.05
        tp_size = adapter.config.tensor_model_parallel_size
        mine = full if adapter.is_row_parallel else full.chunk(tp_size)[runtime.current().tp_rank]
        with torch.no_grad():
            adapter.lora_B.copy_(mine)
    assert model.adapters is not None
    model.adapters.is_new = False
