"""Which rollouts an iteration trains on: the next prompts, stored responses after a kill, dynamic sampling."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_vcppo.config import Config, RolloutConfig
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.log import say
from megatron_vcppo.stages.group_queue import Group, GroupQueue, choose_groups
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession
from megatron_vcppo.stages.windows import Windows


class PromptSampler:
    """Takes prompts from the stream and rollouts from the engines; collective.

    As a part of a checkpoint it is the position in the prompt stream up to which prompts were taken, and the groups
    that were taken and are not trained on yet. With ``ppo.staleness`` there are always some: engines work ahead. With
    ``ppo.window_tokens`` it is also the list of unfinished responses.
    """

    def __init__(
        self,
        config: Config,
        session: RolloutSession,
        stream: PromptStream,
        score: Callable[[RolloutPart], RolloutPart] | None = None,
    ) -> None:
        """score: gives rollouts what the verifiers do not, before they are stored; collective."""
        self.score = score or (lambda rollouts: rollouts)
        self.config, self.session, self.stream = config.ppo, session, stream
        self.sampling = training_sampling(config.rollout, session.runtime.is_main, session.replays_routing)
        self.num_samples = config.rollout.num_samples
        self.taken: list[Group] = []
        """From the stream and not trained on, in its order."""
        self.queue: GroupQueue | None = None
        """Once engines work ahead."""
        self.drains = config.weight_sync.pause == "drain"
        self.windows = Windows(config, session, stream, self.sampling, self._next_place, self.score)

    def next_batch(self, iteration: int) -> RolloutPart:
        """The scored rollouts of an iteration that this rank has; leaders store them in the background.

        The weights of the actor before the iteration must be pushed.
        """
        if self.config.window_tokens is not None or self.windows.unfinished:
            return self.windows.next_batch(iteration)
        if self.config.staleness:
            return self._batch_from_queue(iteration)
        if self.config.dynamic_sampling:
            return self._dynamic_batch(iteration)
        return self.rollouts_for(self._next_prompts(self.config.prompts_per_iteration), iteration)

    def before_push(self) -> None:
        """With ``weight_sync.pause: drain``, wait for running responses: here a stop request is heard, and no deadline
        of the push counts it."""
        if self.queue is not None and self.drains:
            self.queue.settle()

    def rollouts_for(self, prompts: list[Prompt], number: int) -> RolloutPart:
        """Rollouts of these prompts: those that an interrupted attempt stored under the number, else new ones."""
        stored = self.session.batches.stored(number, prompts, self.num_samples)
        if stored is not None:
            return stored
        generated = self.session.generate(prompts, BatchNumber.training(number), self.sampling, self.num_samples)
        rollouts = self.score(generated)
        self.session.batches.store(number, rollouts)
        return rollouts

    def last_number(self, iteration: int) -> int:
        """The highest number under which rollouts of this iteration, or of one before, are stored.

        Each round of dynamic sampling has its own number: seeds and stored files must not meet.
        """
        if not self.config.dynamic_sampling:
            return iteration
        return (iteration + 1) * self.config.dynamic_sampling_rounds - 1

    def state_dict(self) -> dict[str, Any]:
        """The position up to which prompts were taken, and what is not trained on of them."""
        taken = {"taken": [[group.place, group.number] for group in self.taken]} if self.taken else {}
        return self.stream.state_dict() | taken | self.windows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises UserError if the prompts or the seed are not the same."""
        self.stream.load_state_dict(state)
        self.taken = [Group(place, number, self.stream.at(place)) for place, number in state.get("taken", [])]
        self.windows.load_state_dict(state)

    def _next_prompts(self, count: int) -> list[Prompt]:
        """Those that were taken ahead before staleness was 0, then new ones."""
        ahead, self.taken = self.taken[:count], self.taken[count:]
        return [group.prompt for group in ahead] + self.stream.next(count - len(ahead))

    def _next_place(self) -> int:
        """``_next_prompts`` for one, of which the place in the stream is returned."""
        if self.taken:
            return self.taken.pop(0).place
        place = self.stream.position
        self.stream.next(1)
        return place

    def _batch_from_queue(self, iteration: int) -> RolloutPart:
        """Groups are requested for ``ppo.staleness`` iterations ahead, as far as there are iterations."""
        config, count = self.config, self.config.prompts_per_iteration
        ahead = min(config.staleness, config.iterations - iteration)
        while len(self.taken) < count * (ahead + 1):
            number, place = iteration + len(self.taken) // count, self.stream.position
            self.taken.append(Group(place, number, *self.stream.next(1)))
        stored = self.session.batches.stored_among(
            iteration, [group.prompt for group in self.taken], count, self.num_samples
        )
        if stored is not None:
            chosen, rollouts = stored
        else:
            if self.queue is None:
                self.queue = GroupQueue(self.session, self.sampling, self.num_samples)
            self.queue.request(self.taken, iteration)
            choose = partial(
                choose_groups,
                count=count,
                iteration=iteration,
                staleness=config.staleness,
                wait_for_due=not config.partial_rollouts,
            )
            chosen, rollouts = self.queue.collect(self.taken, choose)
            rollouts = self.score(rollouts)
            self.session.batches.store(iteration, rollouts)
        self.taken = [group for index, group in enumerate(self.taken) if index not in set(chosen)]
        return rollouts

    def _dynamic_batch(self, iteration: int) -> RolloutPart:
        """Prompts whose samples got equal rewards are replaced, for some rounds (DAPO)."""
        wanted, rounds = self.config.prompts_per_iteration, self.config.dynamic_sampling_rounds
        kept: list[tuple[int, Rollout]] = []
        num_kept = 0
        for round_number in range(rounds):
            number = self.last_number(iteration - 1) + 1 + round_number
            drawn = self.rollouts_for(self._next_prompts(wanted - num_kept), number)
            after = round_number * wanted * self.num_samples
            kept += [(after + place, rollout) for place, rollout in unequal_groups(drawn).items()]
            num_kept = runtime.sum_over_ranks(len(kept)) // self.num_samples
            if num_kept == wanted:
                break
        missing = wanted - num_kept
        if missing and self.session.runtime.is_main:
            say(
                f"warning: iteration {iteration}: {missing} of {wanted} prompts are missing after {rounds} rounds of "
                "dynamic sampling: all their samples got equal rewards"
                + ("" if num_kept else "; the last round is trained on as it is")
            )
        return RolloutPart.of(kept) if num_kept else drawn


def unequal_groups(part: RolloutPart) -> RolloutPart:
    """The rollouts of prompts whose samples did not all get the same reward (DAPO, arXiv 2503.14476, Eq. 11)."""
    rewards: dict[str, set[float | None]] = defaultdict(set)
    for rollout in part.rollouts:
        rewards[rollout.prompt.prompt_id].add(rollout.reward)
    return RolloutPart.of((place, r) for place, r in part.items() if len(rewards[r.prompt.prompt_id]) > 1)


def training_sampling(config: RolloutConfig, is_main: bool, routed_experts: bool = False) -> Sampling:
    """The sampling of a training iteration; warns on the main rank if log-probs will not be the policy's own."""
    filters = [
        f"{name} = {value}"
        for name, value, off in (("rollout.top_p", config.top_p, 1.0), ("rollout.top_k", config.top_k, 0))
        if value != off
    ]
    if filters and is_main:
        say(
            f"warning: {' and '.join(filters)}: responses are drawn from the filtered distribution and their log-probs "
            "are renormalized over the kept tokens, so they are higher than the policy's own (by 0.1 to 1.4 "
            "per token in measurements) and PPO's ratio is biased. Set top_p to 1 and top_k to 0 in training."
        )
    return Sampling(
        config.temperature, config.top_p, config.top_k, list(config.stop), config.ignore_eos, routed_experts
    )
