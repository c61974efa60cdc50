"""A small batch of rollouts, the models that learn from it, and one update under any layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.rollout_share import ExpertsFormat, ModelOutputs, RolloutShare
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_names
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.frozen import freeze
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic, Reference
from megatron_vcppo.mcore.model import ActorModel, build_actor, build_critic
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.stages.advantage_batch import AdvantageBatch, compute_advantages
from megatron_vcppo.stages.ppo_models import token_outputs
from megatron_vcppo.stages.share_exchange import share_out
from megatron_vcppo.stages.training_losses import bounded
from megatron_vcppo.stages.updates import Updater, minibatches
from tools.benchmarks._tiny_models import VOCAB_SIZE, save_tiny_model

MAX_TOKENS, RUN_SEED = 24, 3
SIZES: dict[str, Any] = {"num_hidden_layers": 2}
HEAD = torch.randn(64, generator=torch.Generator().manual_seed(5)) * 0.1


def make_config(folder: Path, ppo: dict[str, Any], **sections: Any) -> Config:
    # A large eps: the division by the root of tiny second moments would magnify float32 noise in the weights.
    optimizer = {"lr": 5e-4, "weight_decay": 0.1, "beta1": 0.8, "eps": 1e-5}
    base = {
        "run": {"dir": str(folder), "seed": RUN_SEED},
        "model": {"hf": str(folder), "dtype": "float32", "max_length": 64},
        "sft": {"train": ""},
        "prompts": {"train": ""},
        "parallel": {"tokens_per_microbatch": 96},
        "rollout": {"max_tokens": MAX_TOKENS, "temperature": 0.8, "num_samples": 2},
        "ppo": {"minibatches": 2, "ppo_epochs": 2, "optimizer": optimizer, "critic": {"optimizer": optimizer}},
    }
    merged = OmegaConf.merge(OmegaConf.structured(Config), base, {"ppo": ppo} | sections)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def save_models(folder: Path, family: str = "qwen2") -> Path:
    """The model that actor and critic start from, and another as the reference of KL terms."""
    save_tiny_model(folder / "reference", family, seed=1, **SIZES)
    return save_tiny_model(folder / "hf", family, **SIZES)


def reference_of(config: Config) -> Path:
    return Path(config.model.hf).with_name("reference")


def make_rollouts(num_prompts: int = 8, num_samples: int = 2, seed: int = 0) -> list[Rollout]:
    """Two samples of each prompt; one group has equal rewards, one response was truncated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rollouts = []
    for number in range(num_prompts):
        prompt = Prompt(f"p{number}", tuple(draw(0, VOCAB_SIZE) for _ in range(draw(2, 9))), "", "", "test")
        for sample in range(num_samples):
            length = MAX_TOKENS if number == 2 and sample == 0 else draw(3, MAX_TOKENS)
            ids = tuple(draw(0, VOCAB_SIZE) for _ in range(length))
            logprobs = tuple((torch.rand(length, generator=generator) * -4).tolist())
            reason = "length" if length == MAX_TOKENS else "stop"
            reward = 1.0 if (number + sample) % 2 or number == 5 else -1.0
            rollouts.append(Rollout(prompt, sample, 0, ids, "", logprobs, reason, 0, reward, ""))
    return rollouts


def with_observations(rollouts: list[Rollout]) -> list[Rollout]:
    """The same with a span in the middle, and in some a second one at the end, that a tool wrote."""
    found = []
    for i, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        spans = [(1, 1 + length // 3)] if length > 3 else []
        spans += [(length - 1, length)] if spans and i % 3 == 0 else []
        logprobs = [*rollout.rollout_logprobs]
        for start, end in spans:
            logprobs[start:end] = [0.0] * (end - start)
        found.append(replace(rollout, observations=tuple(spans), rollout_logprobs=logprobs))
    return found


def in_windows(rollouts: list[Rollout]) -> list[Rollout]:
    """The same, of which some are unfinished and some are continued; one minibatch of two has no finished response."""
    finished = set(minibatches(len(rollouts), 2, RUN_SEED, 1, 0)[0])
    found = []
    for i, rollout in enumerate(rollouts):
        num_trained = len(rollout.response_ids) // 2 if i % 3 else 0
        unfinished = {} if i in finished and i % 4 else {"finish_reason": "window", "reward": None}
        found.append(replace(rollout, num_trained=num_trained, **unfinished))  # type: ignore[arg-type]
    return found


def share_of(rollouts: list[Rollout], experts: ExpertsFormat | None = None) -> RolloutShare:
    """This replica's share of a batch whose prompts leaders took in turn; after ``build``, on every rank."""
    current = runtime.current()
    group = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(r.prompt.prompt_id for r in rollouts))}
    mine = [
        (place, rollout)
        for place, rollout in enumerate(rollouts)
        if current.is_leader and group[rollout.prompt.prompt_id] % current.dp_size == current.dp_rank
    ]
    return share_out(RolloutPart.of(mine), experts)


def of_all_replicas(share: RolloutShare, flat: Tensor) -> Tensor:
    """[response tokens of the batch] from each replica's [N]; the same on every rank."""
    lengths = share.batch.lengths.tolist()
    whole = [torch.zeros(length) for length in lengths]
    for row, values in zip(share.rows.tolist(), flat.split([lengths[row] for row in share.rows]), strict=True):
        whole[row] = values.float()
    return runtime.sum_over_replicas(torch.cat(whole))


@dataclass
class Models:
    """This rank's part of the models, and how it works on a batch."""

    config: Config
    packer: Packer
    actor: Actor
    critic: Critic | None
    reference: Reference | None

    def token_outputs(self, share: RolloutShare) -> dict[str, Tensor]:
        """Log-probs and values under the current weights, by name: [N]."""
        found = {"logprobs": token_outputs(share, self.packer, self.actor.logprobs, replays_routing=True)}
        if self.critic is not None:
            found["values"] = token_outputs(share, self.packer, self.critic.values)
        return found

    def outputs(self, share: RolloutShare) -> ModelOutputs:
        """What an update of this batch reads."""
        ref = None if self.reference is None else token_outputs(share, self.packer, self.reference.logprobs)
        found = self.token_outputs(share)
        values = bounded(found["values"], self.config.values) if self.critic is not None else None
        return ModelOutputs(found["logprobs"], share.rollout_logprobs, ref, values)

    def advantages(self, share: RolloutShare, outputs: ModelOutputs) -> AdvantageBatch:
        ppo = self.config.ppo
        return compute_advantages(
            share,
            outputs,
            ppo.advantage,
            ppo.loss,
            returns_config=self.config.returns,
            kl_coef=ppo.loss.kl_coef,
            max_tokens=MAX_TOKENS,
            end_of_thinking_id=None,
        )

    @property
    def updater(self) -> Updater:
        seed = self.config.run.seed
        return Updater(
            actor=self.actor,
            critic=self.critic,
            packer=self.packer,
            config=self.config.ppo,
            values_config=self.config.values,
            returns_config=self.config.returns,
            run_seed=seed,
            max_tokens=MAX_TOKENS,
        )


def build(config: Config) -> Models:
    """Join the ranks and load the models."""
    joined = runtime.start(config.parallel, config.run.seed, 60)
    arch = Architecture.from_hf(config.model.hf)

    def loaded(folder: str | Path) -> ActorModel:
        model = build_actor(arch, config.model, config.parallel)
        load_hf(model, folder)
        return model

    ppo, temperature = config.ppo, config.rollout.temperature
    actor = Actor(loaded(config.model.hf), config.parallel, ppo.optimizer, ppo.schedule, 4, temperature=temperature)
    critic = None
    if ppo.advantage.baseline == "critic":
        model = build_critic(arch, config.model, config.parallel)
        load_hf(model, config.model.hf)
        freeze(model, frozen_names(arch, ppo.critic.frozen, "ppo.critic.frozen", config.parallel.pp))
        if joined.is_last_stage:
            model.value_head.weight.data.copy_(HEAD[None])
        critic = Critic(model, config.parallel, ppo.critic.optimizer, ppo.critic.schedule, 4)
    reference = Reference(loaded(reference_of(config)), temperature) if ppo.loss.kl_coef else None
    packer = Packer.of(config.parallel, config.model, joined.dp_rank, joined.dp_size)
    return Models(config, packer, actor, critic, reference)
