"""Which rollouts an iteration trains on: the next prompts, stored responses after a kill, dynamic sampling."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.stages.rollout_session import PendingRollouts, RolloutSession


@dataclass(frozen=True)
class Ahead:
    """An iteration whose generation has begun before its turn."""

    iteration: int
    place: dict[str, Any]
    """Of the prompt stream before it: where a resume goes on, because what is under way is lost with the process."""
    rollouts: PendingRollouts | list[Rollout]


class PromptSampler:
    """Takes prompts from the stream and rollouts from the engines; collective."""

    def __init__(self, config: Config, generation: RolloutSession, stream: PromptStream, sampling: Sampling) -> None:
        self.config, self.generation, self.stream, self.sampling = config, generation, stream, sampling
        self.num_samples = config.rollout.num_samples
        self.ahead: Ahead | None = None

    def take(self, iteration: int) -> list[Rollout]:
        """The scored rollouts of an iteration, stored in the run before they are returned."""
        if self.ahead is not None:
            rollouts, self.ahead = self.wait(self.ahead), None
            return rollouts
        settings = self.config.ppo
        wanted = settings.prompts_per_iteration
        if not settings.dynamic_sampling:
            return self.of(iteration, self.stream.next(wanted))
        kept: list[Rollout] = []
        missing = wanted
        for round_number in range(settings.dynamic_sampling_rounds):
            # Rounds get iteration numbers of their own: seeds and stored files must not meet.
            tag = self.last_tag(iteration - 1) + 1 + round_number
            drawn = self.of(tag, self.stream.next(missing))
            kept += unequal_groups(drawn)
            missing = wanted - len(kept) // self.num_samples
            if not missing:
                break
        if missing and self.generation.world.is_main:
            print(
                f"warning: iteration {iteration}: {missing} of {wanted} prompts are missing after "
                f"{settings.dynamic_sampling_rounds} rounds of dynamic sampling: all their samples got equal rewards"
                + ("" if kept else "; the last round is trained on as it is"),
                flush=True,
            )
        return kept or drawn

    def last_tag(self, iteration: int) -> int:
        """The highest number under which rollouts of this iteration, or of one before, are stored."""
        settings = self.config.ppo
        return (iteration + 1) * settings.dynamic_sampling_rounds - 1 if settings.dynamic_sampling else iteration

    def begin(self, iteration: int) -> None:
        """Start on an iteration before its turn; ``take`` waits for it."""
        place = self.stream.state_dict()
        prompts = self.stream.next(self.config.ppo.prompts_per_iteration)
        rollouts = self.generation.stored(iteration, prompts, self.num_samples)
        begun = rollouts or self.generation.begin(prompts, iteration, self.sampling, self.num_samples)
        self.ahead = Ahead(iteration, place, begun)

    def settle(self) -> None:
        """Wait for what was begun, so that other weights may be pushed before its turn comes."""
        if self.ahead is not None:
            self.ahead = replace(self.ahead, rollouts=self.wait(self.ahead))

    def wait(self, ahead: Ahead) -> list[Rollout]:
        """The rollouts of an iteration that was begun, stored."""
        if isinstance(ahead.rollouts, list):
            return ahead.rollouts
        rollouts = self.generation.finish(ahead.rollouts)
        self.generation.store(ahead.iteration, rollouts)
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        """The place in the prompt stream up to which rollouts were taken."""
        return self.stream.state_dict() if self.ahead is None else self.ahead.place

    def of(self, iteration: int, prompts: list[Prompt]) -> list[Rollout]:
        """Rollouts of these prompts: those that an interrupted attempt stored, else new ones."""
        stored = self.generation.stored(iteration, prompts, self.num_samples)
        if stored is not None:
            return stored
        rollouts = self.generation.generate(prompts, iteration, self.sampling, self.num_samples)
        self.generation.store(iteration, rollouts)
        return rollouts


def unequal_groups(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of prompts whose samples did not all get the same reward (DAPO, arXiv 2503.14476, Eq. 11)."""
    groups: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.prompt.prompt_id].append(rollout)
    return [r for group in groups.values() if len({r.reward for r in group}) > 1 for r in group]
