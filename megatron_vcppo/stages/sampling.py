"""Which rollouts an iteration trains on: the next prompts, stored responses after a kill, dynamic sampling."""

from collections import defaultdict

from megatron_vcppo.config import Config
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.wire import Sampling
from megatron_vcppo.stages.generation import Generation


class Sampler:
    """Takes prompts from the stream and rollouts from the engines; collective."""

    def __init__(self, config: Config, generation: Generation, stream: PromptStream, sampling: Sampling) -> None:
        self.config, self.generation, self.stream, self.sampling = config, generation, stream, sampling
        self.num_samples = config.rollout.num_samples

    def take(self, iteration: int) -> list[Rollout]:
        """The scored rollouts of an iteration, stored in the run before they are returned."""
        settings = self.config.ppo
        wanted = settings.prompts_per_iteration
        if not settings.dynamic_sampling:
            return self.of(iteration, self.stream.next(wanted))
        kept: list[Rollout] = []
        missing = wanted
        for round_number in range(settings.dynamic_sampling_rounds):
            # Rounds get iteration numbers of their own: seeds and stored files must not meet.
            tag = iteration * settings.dynamic_sampling_rounds + round_number
            kept += unequal_groups(self.of(tag, self.stream.next(missing)))
            missing = wanted - len(kept) // self.num_samples
            if not missing:
                break
        if missing and self.generation.world.is_main:
            print(
                f"warning: iteration {iteration}: {missing} of {wanted} prompts are missing after "
                f"{settings.dynamic_sampling_rounds} rounds of dynamic sampling: all their samples got equal rewards",
                flush=True,
            )
        return kept

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
