"""Minibatch updates of critic and actor on one batch of rollouts."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import loss_denominator
from megatron_vcppo.config import Config
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_batch import Packing, RolloutBatch
from megatron_vcppo.mcore.learner import Actor, Critic, StepResult
from megatron_vcppo.stages.credit import Credit
from megatron_vcppo.stages.losses import ActorLoss, CriticLoss, sequence_weights


@dataclass
class Report:
    """What the updates of one iteration did: means over optimizer steps, and what was left out."""

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
    credit: Credit,
    fields: Mapping[str, Tensor],
    packing: Packing,
    config: Config,
    iteration: int,
    kl_coef: float,
) -> Report:
    """All passes over the batch: for each minibatch the critic's updates, then the actor's; collective.

    actor None: only the critic learns (critic-only iterations, value pretraining); critic None: group baseline.
    fields: [B, T] tensors that the losses read, by name (old_logprobs, values, rollout_logprobs, ref_logprobs).
    """
    settings, report = config.ppo, Report()
    tensors = {
        "response_mask": credit.mask,
        "advantages": credit.advantages,
        "returns": credit.returns,
        "loss_weights": sequence_weights(credit.mask, settings.loss),
        "positive_mask": credit.mask & (batch.rewards > 0)[:, None],
        **fields,
    }
    lengths = [len(r.prompt.token_ids) + len(r.response_ids) for r in batch.rollouts]
    for ppo_epoch in range(settings.ppo_epochs):
        parts = minibatches(len(batch), settings.minibatches, config.run.seed, iteration, ppo_epoch)
        for part in parts:
            mask = credit.mask[part]
            mine = [part[i] for i in packing.share([lengths[i] for i in part])]
            microbatches = packing.pack(batch.sequences(mine, tensors), list(tensors))
            report.count(microbatches)
            report.imbalance.append(packing.imbalance([lengths[i] for i in part]))
            if critic is not None:
                num_tokens, num_rows = int(mask.sum()), int(mask.any(dim=1).sum())
                denominator = loss_denominator("token", num_tokens, num_rows, config.rollout.max_tokens)
                for _ in range(settings.critic.updates_per_actor_update):
                    result = critic.train_step(microbatches, CriticLoss(settings.critic, denominator))
                    report.add("critic", result)
            if actor is not None:
                positive = tensors["positive_mask"][part]
                loss = ActorLoss.of(settings.loss, kl_coef, mask, positive, config.rollout.max_tokens)
                report.add("actor", actor.train_step(microbatches, loss))
    return report
