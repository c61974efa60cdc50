"""Which rollouts an iteration trains on: the next prompts, stored responses after a kill, dynamic sampling."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_vcppo.config import Config, RolloutConfig
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.log import say
from megatron_vcppo.stages.rollout_session import BatchNumber, PendingRollouts, RolloutSession


@dataclass(frozen=True)
class Prefetched:
    """The batch of an iteration, requested before its turn."""

    iteration: int
    position: dict[str, Any]
    """Prompt-stream position before this batch; a resume restarts here because a pending batch dies with the
    process."""
    rollouts: PendingRollouts | RolloutPart


class PromptSampler:
    """Takes prompts from the stream and rollouts from the engines; collective.

    As a part of a checkpoint it is the position in the prompt stream up to which batches were taken.
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
        self.sampling = training_sampling(config.rollout, session.runtime.is_main)
        self.num_samples = config.rollout.num_samples
        self.prefetched: Prefetched | None = None

    def next_batch(self, iteration: int) -> RolloutPart:
        """The scored rollouts of an iteration that this rank has; leaders store them in the background."""
        if self.prefetched is not None:
            rollouts, self.prefetched = self._collect(self.prefetched), None
            return rollouts
        if self.config.dynamic_sampling:
            return self._dynamic_batch(iteration)
        return self.rollouts_for(self.stream.next(self.config.prompts_per_iteration), iteration)

    def prefetch(self, iteration: int) -> None:
        """Request the batch of an iteration before its turn; ``next_batch`` waits for it."""
        position = self.stream.state_dict()
        prompts = self.stream.next(self.config.prompts_per_iteration)
        requested: PendingRollouts | RolloutPart | None = self.session.stored(iteration, prompts, self.num_samples)
        if requested is None:
            number = BatchNumber.training(iteration)
            requested = self.session.request(prompts, number, self.sampling, self.num_samples)
        self.prefetched = Prefetched(iteration, position, requested)

    def drain(self) -> None:
        """Wait for what was prefetched, so that other weights may be pushed before its turn comes."""
        if self.prefetched is not None:
            self.prefetched = replace(self.prefetched, rollouts=self._collect(self.prefetched))

    def rollouts_for(self, prompts: list[Prompt], number: int) -> RolloutPart:
        """Rollouts of these prompts: those that an interrupted attempt stored under the number, else new ones."""
        stored = self.session.stored(number, prompts, self.num_samples)
        if stored is not None:
            return stored
        generated = self.session.generate(prompts, BatchNumber.training(number), self.sampling, self.num_samples)
        rollouts = self.score(generated)
        self.session.store(number, rollouts)
        return rollouts

    def last_number(self, iteration: int) -> int:
        """The highest number under which rollouts of this iteration, or of one before, are stored.

        Each round of dynamic sampling has its own number: seeds and stored files must not meet.
        """
        if not self.config.dynamic_sampling:
            return iteration
        return (iteration + 1) * self.config.dynamic_sampling_rounds - 1

    def state_dict(self) -> dict[str, Any]:
        """The position up to which batches were taken."""
        return self.stream.state_dict() if self.prefetched is None else self.prefetched.position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises UserError if the prompts or the seed are not the same."""
        self.stream.load_state_dict(state)

    def _dynamic_batch(self, iteration: int) -> RolloutPart:
        """Prompts whose samples got equal rewards are replaced, for some rounds (DAPO)."""
        wanted, rounds = self.config.prompts_per_iteration, self.config.dynamic_sampling_rounds
        kept: list[tuple[int, Rollout]] = []
        num_kept = 0
        for round_number in range(rounds):
            number = self.last_number(iteration - 1) + 1 + round_number
            drawn = self.rollouts_for(self.stream.next(wanted - num_kept), number)
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

    def _collect(self, prefetched: Prefetched) -> RolloutPart:
        """The rollouts of a prefetched iteration, which leaders store."""
        if isinstance(prefetched.rollouts, RolloutPart):
            return prefetched.rollouts
        rollouts = self.score(self.session.collect(prefetched.rollouts))
        self.session.store(prefetched.iteration, rollouts)
        return rollouts


def unequal_groups(part: RolloutPart) -> RolloutPart:
    """The rollouts of prompts whose samples did not all get the same reward (DAPO, arXiv 2503.14476, Eq. 11)."""
    rewards: dict[str, set[float | None]] = defaultdict(set)
    for rollout in part.rollouts:
        rewards[rollout.prompt.prompt_id].add(rollout.reward)
    return RolloutPart.of((place, r) for place, r in part.items() if len(rewards[r.prompt.prompt_id]) > 1)


def training_sampling(config: RolloutConfig, is_main: bool) -> Sampling:
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
    return Sampling(config.temperature, config.top_p, config.top_k, list(config.stop), config.ignore_eos)
