"""The models of PPO, their push to the engines, and their outputs for a batch."""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import PackedMicrobatch, unpack_each
from megatron_vcppo.data.rollout_share import RolloutShare
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.learner import Actor, AdapterReference, Critic, Learner, Reference
from megatron_vcppo.stages.initial_models import starting_actor, starting_critic
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.weight_sync.sync import PushResult


class PpoModels:
    """Actor, critic and reference, with the weights that the stage starts from."""

    def __init__(self, config: Config) -> None:
        settings = config.ppo
        steps_per_iteration = settings.ppo_epochs * settings.minibatches
        model = starting_actor(config, "ppo")
        self.actor = Actor(
            model,
            config.parallel,
            settings.optimizer,
            settings.schedule,
            max(0, settings.iterations - settings.critic_only_iterations) * steps_per_iteration,
            temperature=config.rollout.temperature,
        )
        self.learners: dict[str, Learner] = {"actor": self.actor}
        self.critic: Critic | None = None
        if settings.advantage.baseline == "critic":
            self.critic = Critic(
                starting_critic(config, "ppo", settings.critic.init, settings.critic.checkpoint_path, model),
                config.parallel,
                settings.critic.optimizer,
                settings.critic.schedule,
                settings.iterations * steps_per_iteration * settings.critic.updates_per_actor_update,
            )
            self.learners["critic"] = self.critic
        self.reference: Reference | AdapterReference | None = None
        if settings.loss.kl_coef:
            self.reference = (
                Reference(starting_actor(config, "ppo"), config.rollout.temperature)
                if model.adapters is None
                else AdapterReference(self.actor)
            )


def push_actor(actor: Actor, session: RolloutSession, policy_version: int) -> PushResult:
    """Give the engines the weights that the last optimizer step made; collective."""
    model = actor.gathered_model()
    return session.push(policy_version, lambda: stream_hf(model))


def token_outputs(
    share: RolloutShare,
    packer: Packer,
    run: Callable[[Sequence[PackedMicrobatch]], list[Tensor]],
    *,
    replays_routing: bool = False,
) -> Tensor:
    """float32 [N]: log-probs or values of every response token of this replica's share; collective.

    run: ``Actor.logprobs`` or ``Critic.values``. replays_routing: through the experts that engines chose, if they are
    known.
    """
    microbatches = packer.pack(share.sequences({}, with_experts=replays_routing))
    return share.flatten(unpack_each(microbatches, run(microbatches)))
