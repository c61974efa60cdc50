"""Actor and critic as the stages see them: packed micro-batches in, per-token outputs or one optimizer step out."""

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vcppo.algo.metrics import Metrics, add, means, total_metric
from megatron_vcppo.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import PackedMicrobatch, pack
from megatron_vcppo.mcore import optimizer as optim
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.context_parallel import ContextShard, shard_of
from megatron_vcppo.mcore.logprobs import vocab_parallel_logprobs
from megatron_vcppo.mcore.model import ActorModel, CriticModel, PackedGPT
from megatron_vcppo.mcore.offload import Storage, check_resident, gradients, optimizer_state, weights
from megatron_vcppo.mcore.rank_messages import broadcast_value

LossFunction = Callable[..., tuple[Tensor, Metrics]]
"""(outputs, microbatch) -> (sum of token losses / the global denominator, metrics of this micro-batch).

The outputs are those of ``Runner.outputs``: [T] tensors of the whole micro-batch.
"""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    metrics: dict[str, float]
    """Means over the whole batch, the same on every rank."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    applied: bool
    """False if a loss or gradient was not finite: nothing was changed."""


class Runner(abc.ABC):
    """A Megatron model that is run forward over packed micro-batches. Every method is collective over all ranks."""

    def __init__(self, model: PackedGPT) -> None:
        self.runtime = runtime.current()
        self.model = model
        self.module: torch.nn.Module = model

    def storages(self) -> dict[str, list[Storage]]:
        """What the model holds on its device, by part; see ``offload``."""
        return {"weights": weights(self.model)}

    @abc.abstractmethod
    def outputs(self, model_output: Tensor, microbatch: PackedMicrobatch, shard: ContextShard) -> Any:
        """From what the last stage reads out of this rank's tokens to what losses take: [T], outputs of all tokens."""

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[PackedMicrobatch], loss_function: LossFunction) -> dict[str, float]:
        """The loss and its metrics without an update; the same on every rank."""

        def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Callable]:
            microbatch, shard = next(iterator)

            def loss(model_output: Tensor, non_loss_data: bool = True) -> Metrics:
                value, metrics = loss_function(self.outputs(model_output, microbatch, shard), microbatch)
                return {**metrics, "loss": total_metric(value)}

            return self.model.run(microbatch, shard), loss

        self.module.eval()
        return self._reduce(self._run_schedule(microbatches, forward_step, forward_only=True))

    @torch.no_grad()
    def _forward(self, microbatches: Sequence[PackedMicrobatch], pick: Callable[[Any], Tensor]) -> list[Tensor]:
        """One float32 tensor [T] per micro-batch, picked from the outputs; the same on every pipeline stage."""

        def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Callable]:
            microbatch, shard = next(iterator)

            def collect(model_output: Tensor, non_loss_data: bool = True) -> Tensor:
                return pick(self.outputs(model_output, microbatch, shard)).float()

            return self.model.run(microbatch, shard), collect

        self.module.eval()
        collected = self._run_schedule(microbatches, forward_step, forward_only=True)
        lengths = [m.num_tokens for m in microbatches]
        flat = torch.cat(collected) if collected else torch.empty(sum(lengths), device=self.runtime.device)
        self._from_last_stage(flat)
        return list(flat.split(lengths))

    def _run_schedule(
        self, microbatches: Sequence[PackedMicrobatch], forward_step: Callable, forward_only: bool = False
    ) -> list[Any]:
        """What the last stage's loss functions returned, in order; empty on other stages."""
        assert microbatches, "every data-parallel replica needs at least one micro-batch"
        check_resident({"weights": weights(self.model)})
        idle = [self._idle_microbatch()] * (self._schedule_length(microbatches) - len(microbatches))
        on_device = [m.to(self.runtime.device) for m in (*microbatches, *idle)]
        shards = [shard_of(m, self.runtime.device) for m in (*microbatches, *idle)]
        begun = itertools.count()

        def step(iterator: Any, model: Any) -> tuple[Tensor, Callable]:
            if next(begun) < len(microbatches):
                return forward_step(iterator, model)
            return self.model.run(*next(iterator)), _idle_loss

        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=zip(on_device, shards, strict=True),
            model=[self.module],
            num_microbatches=len(on_device),
            seq_length=max(m.num_tokens for m in on_device),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results[: len(microbatches)]

    def _schedule_length(self, microbatches: Sequence[PackedMicrobatch]) -> int:
        """Micro-batches that this rank runs. Where replicas share experts, every one of them takes part in all
        micro-batches of the others: as many as the replica with most has; collective then."""
        runtime = self.runtime
        if runtime.tp_size * runtime.cp_size % runtime.ep_size == 0:
            return len(microbatches)
        most = torch.tensor([len(microbatches)], device=runtime.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return int(most.item())

    def _idle_microbatch(self) -> PackedMicrobatch:
        """Padding only, that any layout can divide."""
        return pack([], [], multiple=2 * self.runtime.tp_size * self.runtime.cp_size)

    def _reduce(self, per_microbatch: Sequence[Metrics]) -> dict[str, float]:
        """Add sums and weights over micro-batches and replicas, divide, and tell every stage.

        Context-parallel ranks of a replica have the same ones already: not added.
        """
        added = add({name: (s.double(), w.double()) for name, (s, w) in part.items()} for part in per_microbatch)
        keys = sorted(added)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        if self.runtime.pp_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            keys = broadcast_value(keys, list[str], last, group, self.runtime.device)
        totals = torch.zeros(len(keys), 2, dtype=torch.float64, device=self.runtime.device)
        if added:
            totals.copy_(torch.stack([torch.stack(added[key]) for key in keys]))
        if self.runtime.is_last_stage:
            dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        self._from_last_stage(totals)
        found = means({key: (total[0], total[1]) for key, total in zip(keys, totals, strict=True)})
        return {key: float(mean) for key, mean in found.items()}

    def _from_last_stage(self, tensor: Tensor) -> None:
        if self.runtime.pp_size > 1:
            dist.broadcast(
                tensor,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )


def _idle_loss(model_output: Tensor, non_loss_data: bool = False) -> Any:
    """Of a micro-batch that only helps others: nothing, but with a gradient, so that its backward pass runs, too."""
    return None if non_loss_data else (model_output.float().sum() * 0.0, {})


class Learner(Runner):
    """A model with its optimizer and schedule.

    ``optimizer_steps`` counts applied and skipped steps: the schedule's clock.
    """

    def __init__(
        self,
        model: PackedGPT,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
    ) -> None:
        super().__init__(model)
        self.module = self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap,
                overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
                use_distributed_optimizer=parallel.distributed_optimizer,
            ),
            model,
        )
        self.optimizer_config, self.schedule, self.total_steps = optimizer, schedule, total_steps
        self.optimizer = optim.build_optimizer(self.ddp, optimizer)
        self.optimizer_steps = 0
        self._gathered = True
        """Whether every rank has what the last step made; with parallel.overlap, forward passes gather it later."""
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap:
            model.config.no_sync_func = self.ddp.no_sync

    def gathered_model(self) -> PackedGPT:
        """The model, with the last step's parameters on every rank; collective after a step, for all that read them.

        Forward passes need it not: they gather layer by layer, while the layers before are computed.
        """
        if not self._gathered:
            self.ddp.start_param_sync(force_sync=True)
            self._gathered = True
        return self.model

    def storages(self) -> dict[str, list[Storage]]:
        """Weights, gradients and optimizer state."""
        state = optimizer_state(self.optimizer, self.model)
        return {**super().storages(), "gradients": gradients(self.ddp), "optimizer state": state}

    def train_step(self, microbatches: Sequence[PackedMicrobatch], loss_function: LossFunction) -> StepResult:
        """Forward and backward over this replica's micro-batches, then one optimizer step.

        Replicas may have different numbers of micro-batches, at least one each. Losses are already divided by the
        global denominator, so gradients and metrics are sums over replicas, whatever the split.
        """
        check_resident(self.storages())
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        # The schedule divides by the number of micro-batches, the gradient reduction by that of replicas (its division
        # by context-parallel ranks, whose gradients are parts of one sum, is undone by the schedule).
        undo_means = self._schedule_length(microbatches) * self.runtime.dp_size
        if self.model.router_step is not None:
            num_tokens = torch.tensor([sum(sum(m.lengths) for m in microbatches)])
            total = int(runtime.sum_over_replicas(num_tokens).item())
            self.model.router_step.begin(max(1, total), self.runtime.dp_size * self.runtime.cp_size)

        def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Callable]:
            microbatch, shard = next(iterator)

            def loss(model_output: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
                value, metrics = loss_function(self.outputs(model_output, microbatch, shard), microbatch)
                detached = {name: (s.detach().clone(), w.detach().clone()) for name, (s, w) in metrics.items()}
                detached["loss"] = total_metric(value)
                return value * undo_means, detached

            return self.model.run(microbatch, shard), loss

        per_microbatch = self._run_schedule(microbatches, forward_step)
        metrics = self._reduce(per_microbatch)
        if self.model.router_step is not None:
            metrics |= self.model.router_step.metrics()
        learning_rate = optim.learning_rate(
            self.optimizer_steps, self.total_steps, self.optimizer_config.lr, self.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        applied, grad_norm = False, math.nan
        if math.isfinite(metrics["loss"]):
            applied, grad_norm = optim.step(self.optimizer, self.optimizer_config.clip_grad)
            self._gathered = not (applied and self.ddp.ddp_config.overlap_param_gather)
        self.optimizer_steps += 1
        return StepResult(metrics, grad_norm, learning_rate, applied)


class Policy(Runner):
    """A model over tokens. Its outputs are (logprobs [T], entropy [T]) of the next token at the temperature."""

    temperature = 1.0

    def outputs(self, model_output: Tensor, microbatch: PackedMicrobatch, shard: ContextShard) -> tuple[Tensor, Tensor]:
        """From logits [T / cp, padded vocabulary / tp] to (logprobs, entropy), float32 [T] each."""
        logprobs, entropy = shard.gather_outputs(
            *vocab_parallel_logprobs(
                model_output, shard.take(microbatch.labels), self.model.arch.vocab_size, temperature=self.temperature
            )
        )
        return logprobs, entropy

    def logprobs(self, microbatches: Sequence[PackedMicrobatch]) -> list[Tensor]:
        """Log-probability of each next token: one tensor [T] per micro-batch, on every rank of the replica."""
        return self._forward(microbatches, lambda outputs: outputs[0])


class Reference(Policy):
    """A policy that is never trained: no gradients, no optimizer."""

    def __init__(self, model: ActorModel, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.temperature = temperature


class Actor(Policy, Learner):
    """The policy that is trained."""

    def __init__(
        self,
        model: ActorModel,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        temperature: float = 1.0,
    ) -> None:
        Learner.__init__(self, model, parallel, optimizer, schedule, total_steps)
        self.temperature = temperature


class AdapterReference(Policy):
    """The policy before training, where training moves only adapters: the actor's own base, with the adapters that it
    started from or, if these were new, without any. Made before the first step."""

    def __init__(self, actor: Actor) -> None:
        assert actor.model.adapters is not None, "a reference without adapters is a model of its own"
        super().__init__(actor.model)
        self.actor, self.temperature = actor, actor.temperature
        self.adapters, self.initial = actor.model.adapters, actor.model.adapters.copy()

    def logprobs(self, microbatches: Sequence[PackedMicrobatch]) -> list[Tensor]:
        """As the policy's."""
        self.actor.gathered_model()
        with self.adapters.replaced_by(self.initial):
            return super().logprobs(microbatches)


class ValueFunction(Runner):
    """A model with a scalar head. Its outputs are values [T]: of the state in which the next token is chosen."""

    model: CriticModel

    def outputs(self, model_output: Tensor, microbatch: PackedMicrobatch, shard: ContextShard) -> Tensor:
        """From values [T / cp] to values [T]."""
        return shard.gather_outputs(model_output)[0]

    def values(self, microbatches: Sequence[PackedMicrobatch]) -> list[Tensor]:
        """One tensor [T] per micro-batch, on every rank of the replica."""
        return self._forward(microbatches, lambda outputs: outputs)


class FrozenValues(ValueFunction):
    """A value function that is never trained, such as a reward model: no gradients, no optimizer."""


class Critic(ValueFunction, Learner):
    """The value function that is trained."""
