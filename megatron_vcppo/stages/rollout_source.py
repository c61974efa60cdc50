"""Rollouts of a fixed policy: new ones for every step, or one stored set that is drawn from again and again."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

from megatron_vcppo.config import Config
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.seeds import fixed_policy_seed
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.model import ActorModel, CriticModel
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import (
    StoredSet,
    claim,
    origin_differences,
    read_places,
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

    def next(self, count: int, step: int) -> RolloutPart:
        """What this rank has of ``count`` scored rollouts for this step (from 1).

        Raises Stopped on every rank if any was asked to stop while they are generated.
        """

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain numbers for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""


def rollout_source(
    stage: Stage,
    session: RolloutSession,
    reached: int,
    model_rewards: ModelRewards | None = None,
    critic: CriticModel | None = None,
) -> RolloutSource:
    """Rollouts of the policy that the stage starts from: fresh ones for every step, or its stored set.

    reached: the step from which the stage continues; stored rollouts after it that another policy made are dropped.
    model_rewards: scores them. critic: the one in training, as ``starting_actor`` takes it.
    """
    config = stage.config
    stream = session.training_prompts(fixed_policy_seed(config.run.seed))
    sampler = PromptSampler(config, session, stream, model_rewards.score if model_rewards is not None else None)
    fresh = FreshRollouts(session, sampler, lambda: starting_actor(config, stage.name, critic))
    wanted = stored_set(config, stage.name)
    if wanted is not None:
        return StoredRollouts(wanted, fresh, stage)
    if stage.runtime.is_main:
        claim(session.batches.folder, origin_of(config, stage.name), reached)
    return fresh


class FreshRollouts:
    """Generates for every step. The actor is loaded and its weights are pushed before the first generation."""

    def __init__(self, session: RolloutSession, sampler: PromptSampler, load_actor: Callable[[], ActorModel]) -> None:
        self.session, self.sampler, self.load_actor = session, sampler, load_actor
        self.actor: ActorModel | None = None
        """Once it is loaded."""

    def next(self, count: int, step: int) -> RolloutPart:
        """Whole groups: at least ``count``."""
        if self.actor is None:
            actor = self.load_actor()
            self.session.share(actor)
            startup.done("model")
            self.session.wait_for_engines()
            self.session.push(0, lambda: stream_hf(actor))
            self.actor = actor
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
    """A set in a folder, made on first use: generate once, pretrain many critics on it. Leaders hold it in parts."""

    CHUNK = 512
    """Rollouts that are generated and stored at a time."""

    def __init__(self, wanted: StoredSet, fresh: FreshRollouts, stage: Stage) -> None:
        """Raises UserError for a set that this model cannot read, Saved if asked to stop while it is made."""
        self.runtime, self.wanted = stage.runtime, wanted
        self.other_scores = False
        """Whether another reward model scored the set, as the main rank knows it."""
        if self.runtime.is_main:
            self._check_origin(wanted, stage)
        self.rollouts = self._load_or_make(fresh)
        """By number in the set, those of this rank."""
        fresh.session.trainer_turn()
        self.actor = fresh.actor
        """The policy, if it had to generate."""
        problem = misfit(self.rollouts.values(), wanted, stage.config)
        for _, text in fresh.session.sync.ranks.texts(problem):
            raise UserError(text)
        self.order = EpochOrder(wanted.num_rollouts, stage.config.run.seed, str(wanted.folder))

    def next(self, count: int, step: int) -> RolloutPart:
        """The next ones of a seeded order; each comes once per epoch."""
        numbers = [number for _, number in self.order.next(count)]
        return RolloutPart.of((p, self.rollouts[number]) for p, number in enumerate(numbers) if number in self.rollouts)

    def read_all(self) -> list[Rollout]:
        """The whole set in its order, on every rank."""
        found: list[Rollout] = []
        for number in stored_iterations(self.wanted.folder):
            found += read_rollouts(self.wanted.folder, number)
        return found[: self.wanted.num_rollouts]

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

    def _load_or_make(self, fresh: FreshRollouts) -> dict[int, Rollout]:
        session, wanted, total = fresh.session, self.wanted, self.wanted.num_rollouts
        known = (stored_iterations(wanted.folder), self.other_scores) if self.runtime.is_main else None
        stored, other_scores = session.sync.ranks.tell(known, tuple[list[int], bool])
        rollouts: dict[int, Rollout] = {}
        number = num_found = 0
        while num_found < total:
            number += 1
            count = min(self.CHUNK, total - num_found)
            if number in stored:
                fresh.skip(count)
                part = fresh.sampler.score(self._read(number, keep_scores=not other_scores))
            else:
                try:
                    stopping.point()
                    part = fresh.next(count, number)
                except Stopped:
                    session.batches.finish()
                    raise Saved(f"asked to stop: the first {num_found} of {total} rollouts are stored") from None
            rollouts |= {num_found + place: rollout for place, rollout in part.items() if num_found + place < total}
            num_found += runtime.sum_over_ranks(len(part))
        session.batches.finish()
        if self.runtime.is_main and not wanted.is_complete:
            wanted.mark_complete()
        return rollouts

    def _read(self, number: int, keep_scores: bool) -> RolloutPart:
        """Whoever made it: leaders take its rollouts in turn."""
        if not self.runtime.is_leader:
            return RolloutPart()
        part = read_places(
            self.wanted.folder, number, lambda place, _: place % self.runtime.dp_size == self.runtime.dp_rank
        )
        if keep_scores:
            return part
        return RolloutPart(part.places, [replace(rollout, model_score=None) for rollout in part.rollouts])


def misfit(rollouts: Iterable[Rollout], wanted: StoredSet, config: Config) -> str:
    """Names the first rollout that the model cannot read, too long or of another vocabulary; "" if there is none."""
    longest, vocabulary = config.model.max_length, Architecture.from_hf(config.model.hf).vocab_size
    for rollout in rollouts:
        num_tokens = len(rollout.prompt.token_ids) + len(rollout.response_ids)
        last = max((*rollout.prompt.token_ids, max(rollout.response_ids)))
        where = f"{wanted.folder}: {rollout.prompt.prompt_id} sample {rollout.sample_index}"
        if num_tokens > longest:
            return f"{where} has {num_tokens} tokens, model.max_length is {longest}"
        if last >= vocabulary:
            return f"{where} has token {last}, the vocabulary of {config.model.hf} has {vocabulary}"
    return ""
