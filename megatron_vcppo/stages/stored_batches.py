"""The batches of rollouts that a stage keeps: whole ones, and what was finished of one when the stage was stopped.

Each leader stores its own part. An attempt with other leaders finds the parts that it needs.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

import torch

from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.mcore.runtime import Runtime, any_rank, max_over_ranks
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.rollout_store import (
    drop_other_parts,
    drop_partial,
    drop_rollouts,
    keep_as_partial,
    read_partial,
    read_places,
    write_partial,
    write_rollouts,
)
from megatron_vcppo.weight_sync.joiners import begin

Sample = tuple[str, int]
"""(prompt id, sample index)"""

STORE_SHARE = 0.8
"""Of run.timeout_s, how long a leader waits for its file: the other ranks wait for it in a collective."""


class StoredBatches:
    """Batches by the number under which they are stored. Methods are collective over the trainer's ranks, but for
    ``keep``, ``kept`` and ``places_of``."""

    def __init__(self, folder: Path, runtime: Runtime, ranks: RankGroup, *, need_experts: bool) -> None:
        """need_experts: rollouts for training without the experts that the engine chose are not taken."""
        self.folder, self.runtime, self.ranks, self.need_experts = folder, runtime, ranks, need_experts
        self.storing: tuple[int, Future[None] | None] | None = None
        """The number of the batch that leaders store in the background, and on leaders its end."""

    def places_of(self, prompts: list[Prompt], num_samples: int) -> dict[Sample, int]:
        """The rollouts that this rank gets → their places; empty on ranks that are no leaders.

        Leaders take prompts in turn.
        """
        if not self.runtime.is_leader:
            return {}
        mine = range(self.runtime.dp_rank, len(prompts), self.runtime.dp_size)
        return {(prompts[i].prompt_id, k): i * num_samples + k for i in mine for k in range(num_samples)}

    def store(self, storage: int, part: RolloutPart) -> None:
        """Keep a batch: each leader writes its part in the background. One batch at a time.

        Nothing that was trained on it may be saved before ``finish``.
        """
        self.finish()
        future = begin(partial(self._write, storage, part)) if self.runtime.is_leader else None
        self.storing = (storage, future)

    def _write(self, storage: int, part: RolloutPart) -> None:
        if self.runtime.is_main:
            drop_other_parts(self.folder, storage, self.runtime.dp_size)
        write_rollouts(self.folder, storage, part, self.runtime.dp_rank, self.runtime.dp_size)

    def finish(self) -> None:
        """Wait until every leader has written what it was given to store; raises if one could not."""
        if self.storing is None:
            return
        (storage, future), self.storing = self.storing, None
        error = None
        if future is not None:
            timeout_s = STORE_SHARE * self.runtime.timeout_s
            wait([future], timeout_s)
            error = future.exception() if future.done() else TimeoutError(f"not done after {timeout_s:g} s")
        if any_rank(error is not None):
            raise RuntimeError(f"storing rollouts {storage} in {self.folder} failed: {error or 'on another rank'}")
        if self.runtime.is_main:
            drop_partial(self.folder, storage)

    def stored(self, storage: int, prompts: list[Prompt], num_samples: int) -> RolloutPart | None:
        """The stored rollouts of exactly these prompts; None if there are none. An iteration that a kill interrupted
        is trained on the responses that it had, so its updates come out the same."""
        every = {(prompt.prompt_id, sample) for prompt in prompts for sample in range(num_samples)}
        return self.stored_samples(storage, every, self.places_of(prompts, num_samples))

    def stored_samples(
        self,
        storage: int,
        every: Collection[Sample],
        places: Mapping[Sample, int],
        so_far: Mapping[Sample, Rollout] | None = None,
    ) -> RolloutPart | None:
        """``stored`` for any samples. every: of the batch. places: of those that this rank gets. so_far: what there was
        of them before, where they are continued."""
        found: dict[int, Rollout] = {}
        num_foreign = 0

        def is_mine(_: int, rollout: Rollout) -> bool:
            nonlocal num_foreign
            sample = rollout.prompt.prompt_id, rollout.sample_index
            num_foreign += sample not in every or self._misses_experts(rollout)
            if sample not in places:
                return False
            num_foreign += not rollout.continues((so_far or {}).get(sample))
            return True

        is_there = True
        if self.runtime.is_leader:
            try:
                part = read_places(self.folder, storage, is_mine)
                found = {places[r.prompt.prompt_id, r.sample_index]: r for r in part.rollouts}
            except UserError:
                is_there = False
        is_whole = is_there and not num_foreign and len(found) == len(places)
        return RolloutPart.of(found.items()) if self._is_taken(storage, is_there, is_whole) else None

    def stored_among(
        self, storage: int, prompts: list[Prompt], count: int, num_samples: int
    ) -> tuple[list[int], RolloutPart] | None:
        """The stored rollouts of any ``count`` of these prompts: which they are, in the order of the batch, and what
        this rank reads of them. None if there are none."""
        index_of = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
        numbers = torch.full((len(prompts),), -1)
        num_found = num_foreign = 0
        is_there, part = True, RolloutPart()

        def is_mine(place: int, rollout: Rollout) -> bool:
            nonlocal num_found, num_foreign
            number, index = place // num_samples, index_of.get(rollout.prompt.prompt_id)
            if index is None or rollout.sample_index != place % num_samples or self._misses_experts(rollout):
                num_foreign += 1
                return False
            numbers[index] = number
            num_found += 1
            return number % self.runtime.dp_size == self.runtime.dp_rank

        if self.runtime.is_leader:
            try:
                part = read_places(self.folder, storage, is_mine)
            except UserError:
                is_there = False
        is_whole = not num_foreign and num_found == count * num_samples
        is_whole = is_whole and sorted(numbers[numbers >= 0].tolist()) == [*range(count)]
        if not self._is_taken(storage, is_there, is_whole or not self.runtime.is_leader):
            return None
        numbers = max_over_ranks(numbers)
        return sorted(range(len(prompts)), key=numbers.tolist().__getitem__)[-count:], part

    def _is_taken(self, storage: int, is_there: bool, is_whole: bool) -> bool:
        """Whether every rank found a stored batch whole; removes what is not; collective."""
        if any_rank(not is_whole):
            if self.runtime.is_main:  # what is there of it would be taken for parts of the batch that follows
                (drop_rollouts if is_there else keep_as_partial)(self.folder, storage)
            self.ranks.barrier()
            return False
        if self.runtime.is_main:
            drop_partial(self.folder, storage)  # a kill may have come between the two
        return True

    def keep(self, storage: int, finished: RolloutPart) -> None:
        """Write what this leader has of a batch that a stop ends."""
        if finished:
            write_partial(self.folder, storage, finished, self.runtime.dp_rank, self.runtime.dp_size)

    def kept(self, storage: int) -> list[Rollout]:
        """What all leaders of an attempt before this one, whatever their number was, kept of a batch."""
        rollouts = read_partial(self.folder, storage)
        if storage < 0:  # an evaluation's
            return rollouts
        return [rollout for rollout in rollouts if not self._misses_experts(rollout)]

    def _misses_experts(self, rollout: Rollout) -> bool:
        return self.need_experts and not rollout.routed_experts

    def forget(self, storage: int) -> None:
        """Drop what was kept of a batch that is complete and is not stored; main rank."""
        if self.runtime.is_main:
            drop_partial(self.folder, storage)
