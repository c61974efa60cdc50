"""AdamW through Megatron (plain, or shared over data-parallel ranks) and its learning-rate schedule."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_vcppo.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW over the model's parameters; biases and norms are not decayed."""
    bf16 = model.config.bf16
    ddp = model.ddp_config
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            bf16=bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
            clip_grad=config.clip_grad,
        ),
        [model],
    )
    apply_settings(optimizer, config)
    for chained in chained_optimizers(optimizer):
        _number_float32_parameters(chained)
        _fuse_on_cpu(chained)
    _make_adamw_states(optimizer)
    return optimizer


def apply_settings(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Apply the configured weight decay, betas and epsilon, overriding those stored in a loaded optimizer state."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps


def chained_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers that have parameters on this rank."""
    every = getattr(optimizer, "chained_optimizers", [optimizer])
    return [chained for chained in every if chained.optimizer is not None]


def _number_float32_parameters(optimizer: Any) -> None:
    """Let a bfloat16 model have float32 parameters (the value head) with the distributed optimizer.

    Megatron 0.16 trains them, but looks up their state as if they did not come first in their group.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for index, (wide, narrow) in enumerate(groups):
        for order, parameter in enumerate([*wide, *narrow]):
            optimizer.model_param_group_index_map[parameter] = (index, order)


def _fuse_on_cpu(optimizer: Any) -> None:
    """One pass over memory per parameter instead of a dozen. torch's AdamW, which Megatron makes without the option."""
    for group in optimizer.optimizer.param_groups:
        if not HAVE_APEX_OR_TE and all(p.device.type == "cpu" for p in group["params"]):
            group["fused"], group["foreach"] = True, False


def _make_adamw_states(optimizer: MegatronOptimizer) -> None:
    """Make the state that AdamW would make at the first step: a checkpoint may come before it, or fill it."""
    for chained in chained_optimizers(optimizer):
        for group in chained.optimizer.param_groups:
            for p in group["params"]:
                state = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                if not HAVE_APEX_OR_TE:  # those count steps per group, torch's per parameter
                    state["step"] = torch.tensor(0.0)
                chained.optimizer.state[p] = state


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Linear warm-up reaches the peak with step warmup_steps; then constant, or half a cosine down to
    peak × min_lr_ratio with the last step.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total_steps - 1 - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine)


@torch.no_grad()
def step(optimizer: MegatronOptimizer, clip_grad: float) -> tuple[bool, float]:
    """Clip and apply the gradients; returns (applied, gradient norm before clipping).

    Gradients that are not finite are not applied: parameters and moments stay as they were, on every rank, because
    the norm is a sum over all of them.
    """
    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(norm):
        return False, norm
    if clip_grad > 0:
        for chained in chained_optimizers(optimizer):  # experts have their own, the norm is of all
            clip_grad_by_total_norm_fp32(chained.get_parameters(), max_norm=clip_grad, total_norm=norm)
    return bool(optimizer.step_with_ready_grads()), norm
