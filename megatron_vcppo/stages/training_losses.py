"""What the configuration says the losses are, as functions of a micro-batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import loss_denominator, token_weights
from megatron_vcppo.algo.losses.policy import dis_loss, entropy_bonus, kl_loss, policy_loss, positive_lm_loss
from megatron_vcppo.algo.losses.value import bound_values, value_loss
from megatron_vcppo.algo.metrics import Metrics
from megatron_vcppo.config import PolicyLossConfig, ValuesConfig
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_share import RolloutTable


@dataclass(frozen=True)
class LossSize:
    """Counts of a whole minibatch, of all replicas, by which its losses are divided."""

    num_tokens: int
    """Response tokens that are trained on: not those of tools, nor those of windows before."""
    num_rollouts: int
    """Rollouts with any."""
    num_positive_tokens: int
    """Of right answers."""
    max_length: int
    """The limit of a response."""

    @classmethod
    def of(cls, batch: RolloutTable, trained: Tensor, max_length: int) -> "LossSize":
        """trained: bool [B], the rollouts that are trained on."""
        lengths = batch.new_lengths
        positive = int(lengths[trained & batch.is_correct].sum())
        return cls(int(lengths[trained].sum()), int(trained.sum()), positive, max_length)

    def denominator(self, aggregation: str) -> int:
        """See ``loss_denominator``."""
        return loss_denominator(aggregation, self.num_tokens, self.num_rollouts, self.max_length)


@dataclass(frozen=True)
class ActorLoss:
    """Clipped surrogate and what is added to it, as a share of one minibatch's loss."""

    config: PolicyLossConfig
    kl_coef: float
    """Of the loss term; 0 if the KL divergence is in the rewards or off."""
    denominator: float
    num_tokens: float
    num_positive_tokens: float

    @classmethod
    def of(cls, config: PolicyLossConfig, kl_coef: float, size: LossSize) -> "ActorLoss":
        """Of a minibatch of this size."""
        return cls(config, kl_coef, size.denominator(config.aggregation), size.num_tokens, size.num_positive_tokens)

    def __call__(self, outputs: tuple[Tensor, Tensor], microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: (logprobs [T], entropy [T])."""
        logprobs, entropy = outputs
        fields, config = microbatch.fields, self.config
        mask = fields["response_mask"]
        weights = fields["loss_weights"]
        loss, metrics = self.surrogate(logprobs, fields)
        terms = [
            entropy_bonus(entropy, mask, coef=config.entropy_coef, denominator=self.denominator, weights=weights),
        ]
        if self.kl_coef:
            terms.append(
                kl_loss(
                    logprobs,
                    ref_logprobs=fields["ref_logprobs"],
                    mask=mask,
                    coef=self.kl_coef,
                    kind=config.kl_kind,
                    denominator=self.denominator,
                    weights=weights,
                )
            )
        if config.positive_lm_coef:
            terms.append(
                positive_lm_loss(
                    logprobs,
                    fields["positive_mask"],
                    coef=config.positive_lm_coef,
                    denominator=self.num_positive_tokens,
                )
            )
        for term, more in terms:
            loss, metrics = loss + term, {**metrics, **more}
        return loss, metrics

    def surrogate(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """The term that follows the advantages."""
        config = self.config
        common: dict[str, Any] = {
            "advantages": fields["advantages"],
            "mask": fields["response_mask"],
            "denominator": self.denominator,
            "weights": fields["loss_weights"],
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
        }
        if config.kind == "dis":
            return dis_loss(logprobs, rollout_logprobs=fields["rollout_logprobs"], **common)
        return policy_loss(
            logprobs,
            old_logprobs=fields["old_logprobs"],
            dual_clip=config.dual_clip,
            rollout_logprobs=fields["rollout_logprobs"] if config.tis_cap is not None else None,
            tis_cap=config.tis_cap,
            **common,
        )


@dataclass(frozen=True)
class CriticLoss:
    """Regression on the returns, as a share of one minibatch's loss: the mean over its tokens."""

    config: ValuesConfig
    denominator: float
    value_clip: float | None = None
    """Largest change from the values before the update; None: no clipping, and no such values are needed."""

    def __call__(self, outputs: Tensor, microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: values [T]."""
        fields = microbatch.fields
        return value_loss(
            bounded(outputs, self.config),
            returns=fields["returns"],
            mask=fields["response_mask"],
            denominator=self.denominator,
            old_values=fields["values"] if self.value_clip is not None else None,
            value_clip=self.value_clip,
            huber_delta=self.config.huber_delta,
        )


def bounded(values: Tensor, config: ValuesConfig) -> Tensor:
    """Values, of any shape, as GAE and the loss read them: within ``config.bounds`` if there are any."""
    return values if config.bounds is None else bound_values(values, *config.bounds)


def sequence_weights(mask: Tensor, config: PolicyLossConfig) -> Tensor:
    """Loss weights [B, T] of the configured aggregation."""
    return token_weights(mask, config.aggregation).to(torch.float32)


class TokenLoss:
    """Mean negative log-probability of the response tokens of a global batch."""

    def __init__(self, num_loss_tokens: float) -> None:
        """num_loss_tokens: over the whole batch, all replicas."""
        self.num_loss_tokens = num_loss_tokens

    def __call__(self, outputs: tuple[Tensor, Tensor], microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: (logprobs [T], entropy [T])."""
        logprobs, entropy = outputs
        mask = microbatch.fields["loss_mask"]
        loss = -torch.where(mask, logprobs, 0.0).sum() / self.num_loss_tokens
        return loss, {"entropy": (torch.where(mask, entropy.detach(), 0.0).sum(), mask.sum())}
