"""AdamW through Megatron (plain, or shared over data-parallel ranks), its learning-rate schedule, and one repair."""

import functools
import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_vcppo.config.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW over the model's parameters; biases and norms are not decayed."""
    if not HAVE_APEX_OR_TE:
        _repair_distributed_torch_adamw()
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
    if not HAVE_APEX_OR_TE:
        _make_adamw_states(optimizer)
    return optimizer


def apply_settings(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """What the configuration says goes, also for an optimizer whose state was made under another one."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps


def _make_adamw_states(optimizer: MegatronOptimizer) -> None:
    """Make the state that torch's AdamW would make at the first step: a checkpoint may come before it."""
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if chained.optimizer is None:  # a rank without parameters of its own
            continue
        for group in chained.optimizer.param_groups:
            for p in group["params"]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                chained.optimizer.state[p] = {"step": torch.tensor(0.0), **moments}


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
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=clip_grad, total_norm=norm)
    return bool(optimizer.step_with_ready_grads()), norm


@functools.cache
def _repair_distributed_torch_adamw() -> None:
    """Make DistributedOptimizer's checkpoints work with torch's AdamW (no Transformer Engine, no apex).

    torch keeps a ``step`` per parameter; Megatron 0.16 assumes one per group: it is not among the tensors that a load
    copies, and after a load all parameters would share (and increment) one.
    """
    original_copy = DistributedOptimizer._set_main_param_and_optimizer_states
    original_load = DistributedOptimizer.load_state_dict

    def copy_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original_copy(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    def load(self: Any, state_dict: dict[str, Any]) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = copy_states
    DistributedOptimizer.load_state_dict = load
