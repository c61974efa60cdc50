"""One PPO update with transformers and plain torch, a sequence at a time: the oracle of the distributed one."""

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from megatron_vcppo.config import Config
from megatron_vcppo.records import Rollout
from megatron_vcppo.stages.updates import minibatches

Rows = list[Tensor]
"""One number per sampled response token, a tensor per rollout."""


class ReferenceCritic(nn.Module):
    def __init__(self, folder: Path, head: Tensor) -> None:
        super().__init__()
        self.trunk = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.head = nn.Linear(len(head), 1)
        with torch.no_grad():
            self.head.weight.copy_(head[None])
            self.head.bias.zero_()

    def forward(self, rollout: Rollout) -> Tensor:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        values = self.head(self.trunk(ids).last_hidden_state)[0, :, 0]
        values = values[len(rollout.prompt.token_ids) - 1 : -1]  # the state in which each response token is chosen
        return values[sampled(rollout)]


def sampled(rollout: Rollout) -> Tensor:
    """bool [response tokens]: what the policy wrote; the oracle has no other tokens."""
    is_sampled = [
        not any(start <= t < end for start, end in rollout.observations) for t in range(len(rollout.response_ids))
    ]
    return torch.tensor(is_sampled)


def logprobs_of(model: nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[len(rollout.prompt.token_ids) - 1 :][sampled(rollout)]


def gae(rewards: Tensor, values: Tensor, lam: float, unfinished: bool = False) -> Tensor:
    """γ = 1; the episode ends after the last token, or goes on with the same value."""
    advantages, running = torch.zeros(len(values)), 0.0
    end = float(values[-1]) if unfinished else 0.0
    for t in reversed(range(len(values))):
        after = float(values[t + 1]) if t + 1 < len(values) else end
        running = float(rewards[t]) + after - float(values[t]) + lam * running
        advantages[t] = running
    return advantages


@dataclasses.dataclass
class Trainer:
    """A model, AdamW with decay of matrices only, clipping; counts its gradient norms and losses."""

    model: nn.Module
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        vectors = [p for p in trained if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.8, 0.95), eps=1e-5)
        self.grad_norms: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.grad_norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        self.losses.append(loss.item())
        self.optimizer.step()


def reference_update(
    folder: Path, kl_reference: Path, head: Tensor, config: Config, rollouts: list[Rollout]
) -> dict[str, object]:
    """Old log-probs and values, advantages and returns, the update; then log-probs and values of the new weights.

    kl_reference: folder of the model from which the KL divergence is taken. Knows the token-level loss, clip-higher,
    double-sided importance sampling, length-adaptive λ, k3 in the loss, positive examples, whitening, frozen parameters
    of the critic, several of its updates per actor update, and responses in windows.
    """
    ppo, temperature = config.ppo, config.rollout.temperature
    actor = Trainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ppo.optimizer.lr,
        ppo.optimizer.weight_decay,
    )
    critic_model = ReferenceCritic(folder, head)
    for name, parameter in critic_model.trunk.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(f"model.{name}", pattern) for pattern in ppo.critic.frozen))
    critic = Trainer(
        critic_model,
        ppo.critic.optimizer.lr,
        ppo.critic.optimizer.weight_decay,
    )
    with torch.no_grad():
        old = [logprobs_of(actor.model, r, temperature) for r in rollouts]
        model = AutoModelForCausalLM.from_pretrained(kl_reference, dtype=torch.float32)
        reference = [logprobs_of(model, r, temperature) for r in rollouts]
        values = [critic.model(r) for r in rollouts]
    advantages, returns = [], []
    for rollout, row in zip(rollouts, values, strict=True):
        rewards = torch.zeros(len(row))
        rewards[-1] = rollout.reward or 0.0
        lam, alpha = ppo.advantage.lam_actor, ppo.advantage.length_adaptive_alpha
        if alpha is not None:
            lam = max(0.0, 1 - 1 / (alpha * len(row)))
        advantages.append(gae(rewards, row, lam, rollout.unfinished))
        returns.append(gae(rewards, row, ppo.advantage.lam_critic, rollout.unfinished) + row)
    new = [torch.arange(len(row)) >= rollout.num_trained for rollout, row in zip(rollouts, advantages, strict=True)]
    every = torch.cat([row[at] for row, at in zip(advantages, new, strict=True)])
    advantages = [(row - every.mean()) / every.std(correction=0) * at for row, at in zip(advantages, new, strict=True)]

    good = [float(rollout.reward or 0.0) > 0 for rollout in rollouts]
    for ppo_epoch in range(ppo.ppo_epochs):
        for part in minibatches(len(rollouts), ppo.minibatches, config.run.seed, 1, ppo_epoch):
            finished = [i for i in part if not rollouts[i].unfinished]
            num_finished = sum(int(sampled(rollouts[i]).sum()) for i in finished)
            for _ in range(ppo.critic.updates_per_actor_update if finished else 0):
                errors = [(critic.model(rollouts[i]) - returns[i]).square().sum() for i in finished]
                critic.step(0.5 * torch.stack(errors).sum() / num_finished)
            num_tokens = sum(int(sampled(rollouts[i]).sum()) - rollouts[i].num_trained for i in part)
            num_positive = sum(int(sampled(rollouts[i]).sum()) - rollouts[i].num_trained for i in part if good[i])
            loss = torch.tensor(0.0)
            for i in part:
                logprobs = logprobs_of(actor.model, rollouts[i], temperature)
                low, high = 1 - ppo.loss.clip_low, 1 + ppo.loss.clip_high
                if ppo.loss.kind == "dis":
                    ratio = (logprobs - torch.tensor(rollouts[i].rollout_logprobs)[sampled(rollouts[i])]).exp()
                    surrogate = ratio * advantages[i] * ((ratio >= low) & (ratio <= high))
                else:
                    ratio = (logprobs - old[i]).exp()
                    surrogate = torch.minimum(ratio * advantages[i], ratio.clamp(low, high) * advantages[i])
                difference = reference[i] - logprobs
                k3 = difference.exp() - 1 - difference
                loss = loss + (-surrogate + ppo.loss.kl_coef * k3)[new[i]].sum() / num_tokens
                if good[i]:
                    loss = loss - ppo.loss.positive_lm_coef * logprobs[new[i]].sum() / num_positive
            actor.step(loss)
    with torch.no_grad():
        return {
            "old_logprobs": old,
            "values": values,
            "advantages": advantages,
            "returns": returns,
            "actor/grad_norm": sum(actor.grad_norms) / len(actor.grad_norms),
            "critic/grad_norm": sum(critic.grad_norms) / len(critic.grad_norms),
            "actor/loss": sum(actor.losses) / len(actor.losses),
            "critic/loss": sum(critic.losses) / len(critic.losses),
            "logprobs_after": [logprobs_of(actor.model, r, temperature) for r in rollouts],
            "values_after": [critic.model(r) for r in rollouts],
        }
