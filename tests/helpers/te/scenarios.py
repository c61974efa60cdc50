"""What ranks do with Transformer Engine's layers, or with torch's: the same functions on both sides of a comparison."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_vcppo.config import Dtype, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import PackedMicrobatch, balance, pack_all, rounding
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_names
from megatron_vcppo.hf.mapping import canonical_name
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.frozen import freeze
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.layers import unfused_attention
from megatron_vcppo.mcore.learner import Actor, Critic, Learner
from megatron_vcppo.mcore.model import build_actor, build_critic, transformer_config
from megatron_vcppo.mcore.offload import drop_fp8_copies
from megatron_vcppo.mcore.optimizer import chained_optimizers
from megatron_vcppo.mcore.starting_weights import load_component, load_from_hf
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.lora import fill
from tests.helpers.training import make_sequences

Kind = Literal["actor", "critic"]
LEARNERS: dict[Kind, Any] = {"actor": (build_actor, Actor), "critic": (build_critic, Critic)}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    hf: Path
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of ModelConfig; layers and dtype float32 unless given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kind: Kind = "actor"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0))
    frozen: tuple[str, ...] = ()
    """Patterns of a critic's parameters that are not trained."""

    @property
    def model_config(self) -> ModelConfig:
        dtype: Dtype = "float32"
        return ModelConfig(**{"hf": str(self.hf), "dtype": dtype, **self.model})


def make_learner(case: Case) -> Learner:
    """With the weights of case.hf; the process group must be there. Adapters, if there are any, add to these."""
    build, learner = LEARNERS[case.kind]
    model = build(Architecture.from_hf(case.hf), case.model_config, case.parallel)
    load_from_hf(model, case.hf)
    if model.adapters is not None:
        fill(model)
    freeze(model, frozen_names(model.arch, case.frozen, "ppo.critic.frozen", case.parallel.pp))
    return learner(model, case.parallel, case.optimizer, ScheduleConfig(), total_steps=10)


def packed(case: Case, seed: int, dp_rank: int = 0, dp_size: int = 1) -> list[PackedMicrobatch]:
    sequences = make_sequences(seed)
    mine = balance([len(s) for s in sequences], dp_size)[dp_rank]
    return pack_all([sequences[i] for i in mine], 160, *rounding(case.parallel, case.model_config))


def train_step(learner: Learner, case: Case, seed: int) -> tuple[float, float]:
    """(loss, gradient norm) of one optimizer step."""
    total = sum(sum(s.fields["loss_mask"]) for s in make_sequences(seed))

    def loss(outputs: Any, microbatch: PackedMicrobatch) -> tuple[Tensor, dict]:
        mask = microbatch.fields["loss_mask"].float()
        error = -outputs[0] if case.kind == "actor" else 0.5 * (outputs - 1.0) ** 2
        return (error * mask).sum() / total, {}

    world = learner.runtime
    result = learner.train_step(packed(case, seed, world.dp_rank, world.dp_size), loss)
    assert result.applied
    return result.metrics["loss"], result.grad_norm


def _name(name: str, learner: Learner) -> str:
    return canonical_name(name, 0, 0, learner.model.arch.sparse_layers)


def outputs_and_gradients(case: Case) -> dict[str, Tensor]:
    """By name: what the model reads out of a batch, and the gradient of every parameter that has one, in Megatron's
    own-layer names."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    microbatches = packed(case, 7)
    run = learner.logprobs if isinstance(learner, Actor) else learner.values  # type: ignore[attr-defined]
    with torch.no_grad():
        found = {"readout": torch.cat([learner.model.run(m) for m in microbatches])}
    found["outputs"] = torch.cat(run(microbatches))
    train_step(learner, case, 7)
    for name, parameter in learner.model.named_parameters():
        if parameter.requires_grad:
            found[f"gradient of {_name(name, learner)}"] = parameter.main_grad.clone()
    return found


def weights_on_a_component(case: Case, component: Path) -> dict[str, Tensor]:
    """What is pushed of new adapters on the weights of a component, by Hugging Face name."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    model = build_actor(Architecture.from_hf(case.hf), case.model_config, case.parallel)
    load_component(model, component, case.hf)
    return {name: tensor.clone() for name, tensor in stream_hf(model)}


def moments(learner: Learner) -> dict[str, Tensor]:
    """Adam's state and the float32 parameters by Megatron's own-layer names, and the number of steps; one rank."""
    every = chained_optimizers(learner.optimizer)
    steps = {float(group["step"]) for one in every for group in one.optimizer.param_groups if "step" in group}
    found = {}
    for name, parameter in learner.model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = _name(name, learner)
        main = getattr(parameter, "main_param", parameter)
        for inner in every:
            if parameter in getattr(inner, "model_param_group_index_map", ()):
                state = inner._get_main_param_and_optimizer_states(parameter)
            elif main in inner.optimizer.state:
                state = {"param": main, **inner.optimizer.state[main]}
        if "step" in state:
            steps.add(float(state["step"]))
        for key in ("param", "exp_avg", "exp_avg_sq"):
            found[f"{key} of {name}"] = state[key].detach().flatten().clone()
    assert len(steps) <= 1
    return found | {"steps": torch.tensor(steps.pop() if steps else 0.0)}


def train(
    case: Case, checkpoints: Path, steps: range, save_at: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train some steps, after a resume from a checkpoint of the first, if that is not 0 or resume is set.

    Returns losses and gradient norms, Adam's moments after loading (or at the start) and when saving, and the streamed
    weights at the end.
    """
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    folder = checkpoint_folder(checkpoints, case.hf)
    if steps.start or resume:
        resumed = folder.resume({case.kind: learner})
        assert resumed is not None and resumed.iteration == steps.start
    found: dict[str, Any] = {"loaded": moments(learner)} if learner.runtime.world_size == 1 else {}
    if save_at == 0:
        folder.save(0, {case.kind: learner}, {})
    found["history"] = []
    for i in steps:
        found["history"].append(train_step(learner, case, i))
        if i + 1 == save_at:
            if learner.runtime.world_size == 1:
                found["saved"] = moments(learner)
            folder.save(i + 1, {case.kind: learner}, {})
    found["weights"] = {name: tensor.clone() for name, tensor in stream_hf(learner.gathered_model())}
    found["optimizer"] = type(learner.optimizer.chained_optimizers[0].optimizer).__module__
    return found


def added_in_place(case: Case) -> dict[str, bool]:
    """Whether the backward pass itself added a parameter's gradient to its float32 buffer."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    train_step(learner, case, 7)
    return {_name(n, learner): p.grad_added_to_main_grad for n, p in learner.model.named_parameters()}


def fp8_run(case: Case, checkpoints: Path) -> dict[str, Any]:
    """Log-probs of a fixed batch before and after each of 3 steps, and what a resumed learner makes of it."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    actor: Any = make_learner(case)
    config, fixed = actor.model.config, packed(case, 5)
    found: dict[str, Any] = {
        "config": {name: getattr(config, name) for name in ("fp8", "fp8_recipe", "fp8_param", "fp8_amax_history_len")},
        "lengths": [m.num_tokens for m in fixed],
        "logprobs": [torch.cat(actor.logprobs(fixed))],
        "losses": [],
    }
    for seed in range(3):
        found["losses"].append(train_step(actor, case, seed)[0])
        found["logprobs"].append(torch.cat(actor.logprobs(fixed)))
    found["dtypes"] = {str(p.dtype) for p in actor.model.parameters()}
    copies = [m._fp8_workspaces for m in actor.model.modules() if hasattr(m, "_fp8_workspaces")]
    found["copies"] = [sum(map(len, copies))]
    drop_fp8_copies(actor.model)
    found["copies"].append(sum(map(len, copies)))
    found["without copies"] = torch.cat(actor.logprobs(fixed))
    found["quantized"] = sum(m.fp8 for m in actor.model.modules() if hasattr(m, "fuse_wgrad_accumulation"))
    found["keys"] = list(actor.model.sharded_state_dict())
    checkpoint_folder(checkpoints, case.hf).save(1, {"actor": actor}, {})
    resumed: Any = make_learner(case)
    assert checkpoint_folder(checkpoints, case.hf).resume({"actor": resumed}) is not None
    resumed.logprobs(fixed)
    found["resumed"] = torch.cat(resumed.logprobs(fixed))
    found["again"] = torch.cat(actor.logprobs(fixed))
    return found


def fp8_step_of_unequal_replicas(case: Case) -> tuple[int, bool]:
    """One step in which the second of two replicas has one micro-batch: (this replica's micro-batches, applied)."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    world = learner.runtime
    microbatches = packed(case, 7)[: None if world.dp_rank == 0 else 1]

    def loss(outputs: Any, microbatch: PackedMicrobatch) -> tuple[Tensor, dict]:
        return -(outputs[0] * microbatch.fields["loss_mask"].float()).sum() / 100, {}

    result = learner.train_step(microbatches, loss)
    return len(microbatches), result.applied


def attention_warnings(case: Case, fused: bool) -> list[str | None]:
    """Before and after a step, with fused attention or without."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    if not fused:
        os.environ["NVTE_FUSED_ATTN"] = "0"  # after Megatron, which sets it when it builds a model
    before = unfused_attention()
    train_step(learner, case, 5)
    return [before, unfused_attention()]


def fp8_config(case: Case) -> dict[str, Any]:
    """The FP8 fields of a model's configuration, and what micro-batches have over multiples of 128 tokens."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    config = make_learner(case).model.config
    lengths = [m.num_tokens % 128 for m in packed(case, 5)]
    return {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe, "lengths": lengths}


def error_of_loading(case: Case, checkpoints: Path) -> str:
    """Load a checkpoint's weights; then what load_state_dict says of a state that lacks one."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    learner = make_learner(case)
    checkpoint_folder(checkpoints, case.hf).save(1, {case.kind: learner}, {})
    load_model(learner.model, checkpoints / "iter_0000001" / case.kind)
    state = {name: shard.data for name, shard in learner.model.sharded_state_dict().items()}
    del state["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(RuntimeError) as caught:
        learner.model.load_state_dict(state)
    return str(caught.value)


def error_of_building(case: Case) -> str:
    """The UserError of a model that cannot be built here."""
    runtime.start(ParallelConfig(), seed=3, timeout_s=60)
    with pytest.raises(UserError) as caught:
        transformer_config(Architecture.from_hf(case.hf), case.model_config, case.parallel)
    return str(caught.value)
