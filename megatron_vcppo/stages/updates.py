"""Minibatch updates of critic and actor on one batch of rollouts; a stop may come between any two optimizer steps."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import loss_denominator
from megatron_vcppo.config import Config
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_batch import Packer, RolloutBatch
from megatron_vcppo.mcore.learner import Actor, Critic, StepResult
from megatron_vcppo.stages.advantage_batch import AdvantageBatch
from megatron_vcppo.stages.training_losses import ActorLoss, CriticLoss, sequence_weights


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
        report = cls(num_tokens=state["num_tokens"], num_padding=state["num_padding"], imbalance=[*state["imbalance"]])
        report.sums.update(state["sums"])
        report.counts.update(state["counts"])
        report.skipped.update({who: [*steps] for who, steps in state["skipped"].items()})
        return report

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


def minibatches(num_rollouts: int, count: int, seed: int, iteration: int, ppo_epoch: int) -> list[list[int]]:
    """A random partition of the rollouts into ``count`` parts of nearly equal size; a function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + ppo_epoch)
    order = torch.randperm(num_rollouts, generator=generator)
    return [part.tolist() for part in order.tensor_split(min(count, num_rollouts))]


def update(
    actor: Actor | None,
    critic: Critic | None,
    batch: RolloutBatch,
    credit: AdvantageBatch,
    fields: Mapping[str, Tensor],
    packing: Packer,
    config: Config,
    iteration: int,
    kl_coef: float,
    report: UpdateMetrics,
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """All passes over the batch: for each minibatch the critic's updates, then the actor's; collective.

    report: is added to; the optimizer steps that it counts already were done before a resume and are not done again.
    before_step: called before each optimizer step; what it raises leaves the models and the report at that point.
    actor None: only the critic learns (critic-only iterations, value pretraining); critic None: group baseline.
    fields: [B, T] tensors that the losses read, by name (old_logprobs, values, rollout_logprobs, ref_logprobs).
    """
    settings = config.ppo
    tensors = {
        "response_mask": credit.mask,
        "advantages": credit.advantages,
        "returns": credit.returns,
        "loss_weights": sequence_weights(credit.mask, settings.loss),
        "positive_mask": credit.mask & (batch.rewards > 0)[:, None],
        **fields,
    }
    lengths = [len(r.prompt.token_ids) + len(r.response_ids) for r in batch.rollouts]
    parts = [
        part
        for ppo_epoch in range(settings.ppo_epochs)
        for part in minibatches(len(batch), settings.minibatches, config.run.seed, iteration, ppo_epoch)
    ]
    for number, part in enumerate(parts, 1):
        critic_steps = number * settings.critic.updates_per_actor_update if critic is not None else 0
        actor_steps = number if actor is not None else 0
        if report.num_steps("critic") >= critic_steps and report.num_steps("actor") >= actor_steps:
            continue
        mask = credit.mask[part]
        mine = [part[i] for i in packing.share([lengths[i] for i in part])]
        microbatches = packing.pack(batch.sequences(mine, tensors), list(tensors))
        if len(report.imbalance) < number:
            report.count(microbatches)
            report.imbalance.append(packing.imbalance([lengths[i] for i in part]))
        num_tokens, num_rows = int(mask.sum()), int(mask.any(dim=1).sum())
        denominator = loss_denominator("token", num_tokens, num_rows, config.rollout.max_tokens)
        while critic is not None and report.num_steps("critic") < critic_steps:
            before_step()
            critic_loss = CriticLoss(config.values, denominator, settings.critic.value_clip)
            report.add("critic", critic.train_step(microbatches, critic_loss))
        if actor is not None and report.num_steps("actor") < actor_steps:
            before_step()
            positive = tensors["positive_mask"][part]
            loss = ActorLoss.of(settings.loss, kl_coef, mask, positive, config.rollout.max_tokens)
            report.add("actor", actor.train_step(microbatches, loss))
