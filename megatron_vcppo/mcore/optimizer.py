"""AdamW through Megatron (plain, or shared over data-parallel ranks), its learning-rate schedule, and one repair."""

import functools
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

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
    for chained in _chained(optimizer):
        _number_float32_parameters(chained)
    _make_adam_states(optimizer)
    return optimizer


def apply_settings(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """What the configuration says goes, also for an optimizer whose state was made under another one."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps


def _chained(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers that have parameters on this rank."""
    every = getattr(optimizer, "chained_optimizers", [optimizer])
    return [chained for chained in every if chained.optimizer is not None]


def _number_float32_parameters(optimizer: Any) -> None:
    """Let a bfloat16 model have float32 parameters (the value head).

    Megatron 0.16 trains them, but numbers the parameters of a checkpoint without them (plain), or as if they did not
    come first in their group (distributed).
    """
    if isinstance(optimizer, DistributedOptimizer):
        groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
        for index, (wide, narrow) in enumerate(groups):
            for order, parameter in enumerate([*wide, *narrow]):
                optimizer.model_param_group_index_map[parameter] = (index, order)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params) and any(optimizer.fp32_from_fp32_groups):
        # What is loaded is not written into the parameter itself: the model's own weight is loaded into that.
        optimizer.sharded_state_dict = _with_float32_parameters(
            optimizer, optimizer.sharded_state_dict, copy_of=lambda p: p.detach().clone()
        )
        optimizer.load_state_dict = _with_float32_parameters(optimizer, optimizer.load_state_dict)


def _with_float32_parameters(
    optimizer: Any, method: Callable[..., Any], copy_of: Callable[[Tensor], Tensor] = lambda p: p
) -> Callable[..., Any]:
    """The method, to which float32 parameters have float32 copies as the others do: a checkpoint has those of all."""
    names = ("float16_groups", "fp32_from_float16_groups")

    def call(*args: Any, **kwargs: Any) -> Any:
        apart = {name: getattr(optimizer, name) for name in names}
        copies, parameters = (chain(*apart[name]) for name in reversed(names))
        model_of = {id(copy): parameter for copy, parameter in zip(copies, parameters, strict=True)}
        groups = [group["params"] for group in optimizer.optimizer.param_groups]
        optimizer.float16_groups = [[model_of.get(id(p), p) for p in group] for group in groups]
        optimizer.fp32_from_float16_groups = [
            [p if id(p) in model_of else copy_of(p) for p in group] for group in groups
        ]
        try:
            return method(*args, **kwargs)
        finally:
            for name, value in apart.items():
                setattr(optimizer, name, value)

    return call


def fit_state(state: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Change a loaded state so that this optimizer takes it, whichever kind of Adam it was saved from.

    Each kind has settings of its own in the parameter groups. torch's AdamW counts the steps of each parameter, as
    float tensors; Transformer Engine's and apex's FusedAdam those of each group, as an int. Megatron writes torch's as
    "common_step" (without the distributed optimizer) or into the groups (with it), and no count before the first step.
    """
    inner = state.get("optimizer", state)
    counts = {int(group["step"]) for group in inner["param_groups"] if group.get("step") is not None}
    common = inner.get("state", {}).pop("common_step", None)
    if common is not None:
        counts.add(int(common))
    assert len(counts) <= 1, f"parameter groups with different numbers of steps: {counts}"
    step = next(iter(counts), 0)
    for group in inner["param_groups"]:
        group["step"] = step
        for chained in _chained(optimizer):
            for name, value in chained.optimizer.defaults.items():
                group.setdefault(name, value)
    if not HAVE_APEX_OR_TE and "state" in inner:
        inner["state"]["common_step"] = torch.tensor(float(step))
        for group in inner["param_groups"]:
            del group["step"]


def _make_adam_states(optimizer: MegatronOptimizer) -> None:
    """Make the state that Adam would make at the first step: a checkpoint may come before it."""
    for chained in _chained(optimizer):
        for group in chained.optimizer.param_groups:
            for p in group["params"]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                step = {} if HAVE_APEX_OR_TE else {"step": torch.tensor(0.0)}
                chained.optimizer.state[p] = step | moments


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
