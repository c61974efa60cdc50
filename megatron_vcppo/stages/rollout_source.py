"""Rollouts of a fixed policy: new ones for every step, or one stored set that is drawn from again and again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_vcppo.config import Config
from megatron_vcppo.data.order import EpochOrder
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.records import Rollout
from megatron_vcppo.rollout.store import read_rollouts, stored_iterations
from megatron_vcppo.rollout.wire import Sampling
from megatron_vcppo.stages.generation import Generation, Tensors
from megatron_vcppo.stages.sampling import Sampler


class RolloutSource(Protocol):
    """Where the next rollouts come from. Every method is collective."""

    def next(self, count: int, step: int) -> list[Rollout]:
        """``count`` scored rollouts for this step (from 1); the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain numbers for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""


class FreshRollouts:
    """Generates for every step. The weights are pushed once, before the first generation."""

    def __init__(
        self,
        config: Config,
        generation: Generation,
        stream: PromptStream,
        sampling: Sampling,
        source: Callable[[], Tensors],
    ) -> None:
        self.generation, self.stream, self.source = generation, stream, source
        self.sampler = Sampler(config, generation, stream, sampling)
        self.num_samples = config.rollout.num_samples
        self.pushed = False

    def next(self, count: int, step: int) -> list[Rollout]:
        if not self.pushed:
            self.generation.wait_for_engines()
            self.generation.push(0, self.source)
            self.pushed = True
        return self.sampler.of(step, self.stream.next(-(-count // self.num_samples)))

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class StoredRollouts:
    """A set in a folder, made on first use: generate once, pretrain many critics on it."""

    CHUNK = 512
    """Rollouts per stored part: what a kill while the set is made costs at most."""

    def __init__(self, folder: Path, total: int, fresh: FreshRollouts, config: Config) -> None:
        self.rollouts = self._load_or_make(folder, total, fresh)
        self.order = EpochOrder(len(self.rollouts), config.run.seed, str(folder))

    def _load_or_make(self, folder: Path, total: int, fresh: FreshRollouts) -> list[Rollout]:
        generation = fresh.generation
        stored = generation.sync.exchange(stored_iterations(folder) if generation.world.is_main else None)[0]
        rollouts: list[Rollout] = []
        part = 0
        while len(rollouts) < total:
            part += 1
            count = min(self.CHUNK, total - len(rollouts))
            if part in stored:
                fresh.stream.next(-(-count // fresh.num_samples))
                found = read_rollouts(folder, part) if generation.world.is_main else None
                rollouts += generation.sync.exchange(found)[0]
            else:
                rollouts += fresh.next(count, part)
        return rollouts[:total]

    def next(self, count: int, step: int) -> list[Rollout]:
        return [self.rollouts[index] for _, index in self.order.next(count)]

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
