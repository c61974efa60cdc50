"""Minibatch updates of critic and actor on one batch of rollouts; a stop may come between any two optimizer steps."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vcppo.config import PpoConfig, ReturnsConfig, ValuesConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare, RolloutTable, field_types
from megatron_vcppo.data.seeds import minibatch_seed
from megatron_vcppo.mcore.learner import Actor, Critic, StepResult
from megatron_vcppo.stages.advantage_batch import AdvantageBatch, trained_rollouts
from megatron_vcppo.stages.share_exchange import move, replica_of_each
from megatron_vcppo.stages.training_losses import ActorLoss, CriticLoss, LossSize, sequence_weights


@dataclass
class UpdateMetrics:
    """What the updates of one iteration did: means over optimizer steps, and what was skipped.

    It also says how far they are: the next optimizer step of each model is the one after those counted here.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_tokens: int = 0
    num_padding: int = 0
    imbalance: list[float] = field(default_factory=list)
    """Per minibatch: tokens of the fullest replica over the mean."""
    skipped: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """Per model and optimizer step, in order: whether its loss or gradient was not finite."""

    def add(self, who: str, result: StepResult) -> None:
        """Count one optimizer step."""
        self.skipped[who].append(not result.applied)
        values = {**result.metrics, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        if result.applied:
            for name, value in values.items():
                self.sums[f"{who}/{name}"] += value
                self.counts[f"{who}/{name}"] += 1

    def num_steps(self, who: str) -> int:
        """Optimizer steps so far, skipped ones included."""
        return len(self.skipped.get(who, ()))

    @property
    def num_all_steps(self) -> int:
        """The same over all models."""
        return sum(len(steps) for steps in self.skipped.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        numbers = {"num_tokens": self.num_tokens, "num_padding": self.num_padding, "imbalance": [*self.imbalance]}
        skipped = {who: [*steps] for who, steps in self.skipped.items()}
        return numbers | {"sums": dict(self.sums), "counts": dict(self.counts), "skipped": skipped}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "UpdateMetrics":
        """Continues where ``state_dict`` was taken."""
        metrics = cls(num_tokens=state["num_tokens"], num_padding=state["num_padding"], imbalance=[*state["imbalance"]])
        metrics.sums.update(state["sums"])
        metrics.counts.update(state["counts"])
        metrics.skipped.update({who: [*steps] for who, steps in state["skipped"].items()})
        return metrics

    def count(self, microbatches: list[PackedMicrobatch]) -> None:
        """Count tokens and padding of this replica."""
        self.num_tokens += sum(m.num_tokens for m in microbatches)
        self.num_padding += sum(m.padding_tokens for m in microbatches)

    def means(self) -> dict[str, float]:
        """Every metric's mean over the applied steps, and how well the batch was packed and shared out."""
        return {name: total / self.counts[name] for name, total in self.sums.items()} | {
            "packing/padding_share": self.num_padding / max(1, self.num_tokens),
            "packing/dp_imbalance": sum(self.imbalance) / max(1, len(self.imbalance)),
        }


def minibatches(num_rollouts: int, count: int, run_seed: int, iteration: int, ppo_epoch: int) -> list[list[int]]:
    """A random partition of the rollouts into ``count`` parts of nearly equal size; a function of its arguments."""
    generator = torch.Generator().manual_seed(minibatch_seed(run_seed, iteration, ppo_epoch))
    order = torch.randperm(num_rollouts, generator=generator)
    return [part.tolist() for part in order.tensor_split(min(count, num_rollouts))]


@dataclass(frozen=True)
class Updater:
    """What the updates of all iterations have in common."""

    actor: Actor
    critic: Critic | None
    """None: the baseline is the group."""
    packer: Packer
    config: PpoConfig
    values_config: ValuesConfig
    returns_config: ReturnsConfig
    run_seed: int
    max_tokens: int
    """The limit of a response."""

    def update(
        self,
        share: RolloutShare,
        advantages: AdvantageBatch,
        outputs: ModelOutputs,
        *,
        iteration: int,
        kl_coef: float,
        metrics: UpdateMetrics,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """All passes over the batch: for each minibatch the critic's steps, then the actor's; collective.

        Args:
            iteration: from 1. In the first ``critic_only_iterations`` the actor stays as it is.
            kl_coef: of the KL divergence; the loss has that term if ``ppo.loss.kl_in`` says so.
            metrics: is added to; the optimizer steps that it counts already were done before a resume and are not done
                again.
            before_step: called before each optimizer step; what it raises leaves models and metrics at that point.
        """
        config, critic = self.config, self.critic
        actor = self.actor if iteration > config.critic_only_iterations else None
        batch = share.batch
        fields = self.fields(advantages, outputs)
        parts = [
            part
            for ppo_epoch in range(config.ppo_epochs)
            for part in minibatches(len(batch), config.minibatches, self.run_seed, iteration, ppo_epoch)
        ]
        windows, critic_steps = batch.has_windows, 0
        for number, part in enumerate(parts, 1):
            # The critic learns from finished responses: all their tokens, of which the actor saw some before.
            finished = [row for row in part if not batch.rows["unfinished"][row]]
            critic_steps += config.critic.updates_per_actor_update if critic is not None and finished else 0
            actor_steps = number if actor is not None else 0
            if metrics.num_steps("critic") >= critic_steps and metrics.num_steps("actor") >= actor_steps:
                continue
            replicas = replica_of_each(batch.sequence_lengths, self.packer.dp_size, part)
            microbatches = self.microbatches(*move(share, fields, replicas), part)
            if len(metrics.imbalance) < number:
                metrics.count(microbatches)
                loads = np.bincount(replicas[part], batch.sequence_lengths[part], self.packer.dp_size)
                metrics.imbalance.append(float(loads.max() / loads.mean()))
            size = LossSize.of(batch.take(part), trained_rollouts(batch, self.returns_config)[part], self.max_tokens)
            if critic is not None and metrics.num_steps("critic") < critic_steps:
                critic_loss = self.critic_loss(batch.take(finished))
                critic_microbatches = self.critic_microbatches(share, fields, finished) if windows else microbatches
                while metrics.num_steps("critic") < critic_steps:
                    before_step()
                    metrics.add("critic", critic.train_step(critic_microbatches, critic_loss))
            if actor is not None and metrics.num_steps("actor") < actor_steps:
                before_step()
                in_loss = kl_coef if config.loss.kl_in == "loss" else 0.0
                metrics.add("actor", actor.train_step(microbatches, ActorLoss.of(config.loss, in_loss, size)))

    def fields(self, advantages: AdvantageBatch, outputs: ModelOutputs) -> dict[str, Tensor]:
        """What the losses read of a token and cannot be known from its rollout, by the name of the field: [N]."""
        loss = self.config.loss
        read = {
            "old_logprobs": True,
            "rollout_logprobs": loss.kind == "dis" or loss.tis_cap is not None,
            "ref_logprobs": loss.kl_in == "loss",
            "values": self.config.critic.value_clip is not None,
        }
        found = {name: tensor for name, tensor in outputs.by_name().items() if read[name]}
        return {"advantages": advantages.advantages, "returns": advantages.returns, **found}

    def critic_loss(self, finished: RolloutTable) -> CriticLoss:
        """Of these rollouts of a minibatch, over all replicas."""
        trained = trained_rollouts(finished, self.returns_config)
        num_tokens = int(finished.sampled_lengths[trained].sum())
        return CriticLoss(self.values_config, num_tokens, self.config.critic.value_clip)

    def critic_microbatches(
        self, share: RolloutShare, fields: dict[str, Tensor], finished: list[int]
    ) -> list[PackedMicrobatch]:
        """This replica's micro-batches of a minibatch's finished rollouts, with what the critic reads; collective."""
        replicas = replica_of_each(share.batch.sequence_lengths, self.packer.dp_size, finished)
        read: dict[str, Tensor] = {name: fields[name] for name in ("returns", "values") if name in fields}
        here, read = move(replace(share, routed_experts=None), read, replicas)  # it chooses its experts itself
        mask = here.per_token(trained_rollouts(here.table, self.returns_config)) & here.sampled
        return self.pack(here, {"response_mask": mask, **read}, finished)

    def microbatches(self, share: RolloutShare, fields: dict[str, Tensor], part: list[int]) -> list[PackedMicrobatch]:
        """This replica's micro-batches of a minibatch, in whose order its rollouts are packed."""
        trained = trained_rollouts(share.table, self.returns_config)
        mask = share.per_token(trained) & share.sampled & share.is_new
        weights = torch.zeros(len(mask))
        for block in share.blocks():
            rows = block.pad(mask)
            weights[block.tokens] = sequence_weights(rows, self.config.loss)[block.mask]
        fields = {
            "response_mask": mask,
            "loss_weights": weights,
            "positive_mask": mask & share.per_token(share.table.is_correct),
            **fields,
        }
        return self.pack(share, fields, part)

    def pack(self, share: RolloutShare, fields: dict[str, Tensor], part: list[int]) -> list[PackedMicrobatch]:
        """Micro-batches of the share's rollouts, in the order of ``part``."""
        here = {row: index for index, row in enumerate(share.rows.tolist())}
        order = [here[row] for row in part if row in here]
        return self.packer.pack(share.sequences(fields, order, with_experts=True), field_types(fields))
