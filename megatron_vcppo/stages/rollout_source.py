"""Rollouts of a fixed policy: new ones for every step, or one stored set that is drawn from again and again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from megatron_vcppo.config import Config
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.seeds import fixed_policy_seed
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.model import ActorModel
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import (
    StoredSet,
    claim,
    origin_differences,
    read_rollouts,
    stored_iterations,
    stored_set,
)
from megatron_vcppo.stages.initial_models import starting_actor
from megatron_vcppo.stages.model_rewards import ModelRewards
from megatron_vcppo.stages.prompt_sampler import PromptSampler
from megatron_vcppo.stages.provenance import origin_of
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.stage import Stage
from megatron_vcppo.stages.stopping import Saved, stopping


class RolloutSource(Protocol):
    """Where the next rollouts come from. Every method is collective."""

    def next(self, count: int, step: int) -> list[Rollout]:
        """``count`` scored rollouts for this step (from 1); the same on every rank.

        Raises Stopped on every rank if any was asked to stop while they are generated.
        """

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain numbers for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""


def rollout_source(
    stage: Stage, session: RolloutSession, reached: int, model_rewards: ModelRewards | None = None
) -> RolloutSource:
    """Rollouts of the policy that the stage starts from: fresh ones for every step, or its stored set.

    reached: the step from which the stage continues; stored rollouts after it that another policy made are dropped.
    model_rewards: scores them.
    """
    config = stage.config
    stream = session.training_prompts(fixed_policy_seed(config.run.seed))
    sampler = PromptSampler(config, session, stream, model_rewards.score if model_rewards is not None else None)
    fresh = FreshRollouts(session, sampler, lambda: starting_actor(config, stage.name))
    wanted = stored_set(config, stage.name)
    if wanted is not None:
        return StoredRollouts(wanted, fresh, stage)
    if stage.runtime.is_main:
        claim(session.folder, origin_of(config, stage.name), reached)
    return fresh


class FreshRollouts:
    """Generates for every step. The actor is loaded and its weights are pushed before the first generation."""

    def __init__(self, session: RolloutSession, sampler: PromptSampler, load_actor: Callable[[], ActorModel]) -> None:
        self.session, self.sampler, self.load_actor = session, sampler, load_actor
        self.pushed = False

    def next(self, count: int, step: int) -> list[Rollout]:
        """Whole groups: at least ``count``."""
        if not self.pushed:
            actor = self.load_actor()
            self.session.share(actor)
            startup.done("model")
            self.session.wait_for_engines()
            self.session.push(0, lambda: stream_hf(actor))
            self.pushed = True
        return self.sampler.rollouts_for(self._next_prompts(count), step)

    def skip(self, count: int) -> None:
        """Go past the prompts of ``count`` rollouts."""
        self._next_prompts(count)

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompt stream."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.sampler.load_state_dict(state)

    def _next_prompts(self, count: int) -> list[Prompt]:
        return self.sampler.stream.next(ceil_div(count, self.sampler.num_samples))


class StoredRollouts:
    """A set in a folder, made on first use: generate once, pretrain many critics on it."""

    CHUNK = 512
    """Rollouts per stored part: what a kill while the set is made costs at most; a stop request costs nothing."""

    def __init__(self, wanted: StoredSet, fresh: FreshRollouts, stage: Stage) -> None:
        """Raises UserError for a set that this model cannot read, Saved if asked to stop while it is made."""
        self.is_main = stage.runtime.is_main
        self.other_scores = False
        """Whether another reward model scored the set, as the main rank knows it."""
        if self.is_main:
            self._check_origin(wanted, stage)
        self.rollouts = self._load_or_make(wanted, fresh)
        fresh.session.trainer_turn()
        check_fit(self.rollouts, wanted, stage.config)
        self.order = EpochOrder(len(self.rollouts), stage.config.run.seed, str(wanted.folder))

    def next(self, count: int, step: int) -> list[Rollout]:
        """The next ones of a seeded order; each comes once per epoch."""
        return [self.rollouts[index] for _, index in self.order.next(count)]

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.order.load_state_dict(state)

    def _check_origin(self, wanted: StoredSet, stage: Stage) -> None:
        """A set that is there is taken, with a warning if another policy made it; one begun by another is dropped."""
        made = origin_of(stage.config, stage.name)
        different = origin_differences(wanted.folder, made)
        self.other_scores = not {"rewards.model", "rewards.model.input"}.isdisjoint(different)
        if not wanted.is_complete and (wanted.is_own or not stored_iterations(wanted.folder)):
            claim(wanted.folder, made, 0)
        elif different:
            say(
                f"warning: {wanted.folder} was made under other settings ({', '.join(different)}): its returns are not "
                "those of this actor; without the folder, the set is made again"
            )

    def _load_or_make(self, wanted: StoredSet, fresh: FreshRollouts) -> list[Rollout]:
        session, total = fresh.session, wanted.num_rollouts
        stored = session.sync.exchange(stored_iterations(wanted.folder) if self.is_main else None)[0]
        rollouts: list[Rollout] = []
        part = 0
        while len(rollouts) < total:
            part += 1
            count = min(self.CHUNK, total - len(rollouts))
            if part in stored:
                fresh.skip(count)
                found = read_rollouts(wanted.folder, part) if self.is_main else None
                if found is not None and self.other_scores:
                    found = [replace(rollout, model_score=None) for rollout in found]
                rollouts += fresh.sampler.score(session.sync.exchange(found)[0])
                continue
            try:
                stopping.point()
                rollouts += fresh.next(count, part)
            except Stopped:
                raise Saved(f"asked to stop: the first {len(rollouts)} of {total} rollouts are stored") from None
        if self.is_main and not wanted.is_complete:
            wanted.mark_complete()
        return rollouts[:total]


def check_fit(rollouts: list[Rollout], wanted: StoredSet, config: Config) -> None:
    """UserError names the first rollout that the model cannot read: too long, or of another vocabulary."""
    longest, vocabulary = config.model.max_length, Architecture.from_hf(config.model.hf).vocab_size
    for rollout in rollouts:
        ids = (*rollout.prompt.token_ids, *rollout.response_ids)
        where = f"{wanted.folder}: {rollout.prompt.prompt_id} sample {rollout.sample_index}"
        if len(ids) > longest:
            raise UserError(f"{where} has {len(ids)} tokens, model.max_length is {longest}")
        if max(ids) >= vocabulary:
            raise UserError(f"{where} has token {max(ids)}, the vocabulary of {config.model.hf} has {vocabulary}")
