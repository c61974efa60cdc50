"""Batches of windows (T-PPO, arXiv 2506.15050): every response of a batch gets a number of tokens per iteration. Those
that are finished leave the batch and new ones take their places; the others are continued in the next iteration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vcppo.config import Config
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.generation import PendingRequest
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import read_places
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession
from megatron_vcppo.stages.stored_batches import Sample


@dataclass(frozen=True)
class Started:
    """A response from its first window to its last."""

    place: int
    """Of the prompt in the stream."""
    number: int
    """The iteration of its first window, of which its sampling seeds are derived."""
    sample_index: int
    prompt: Prompt

    @property
    def sample(self) -> Sample:
        """What it is called among the rollouts of a batch."""
        return self.prompt.prompt_id, self.sample_index


class Windows:
    """Makes the batches, in which unfinished responses come first and in their order; collective.

    A leader keeps the unfinished responses that it has; new ones go to the leaders that have the fewest. As a part of a
    checkpoint it is the list of unfinished responses; what there is of them is in the stored batch before.
    """

    def __init__(
        self,
        config: Config,
        session: RolloutSession,
        stream: PromptStream,
        sampling: Sampling,
        next_place: Callable[[], int],
        score: Callable[[RolloutPart], RolloutPart],
    ) -> None:
        """next_place: takes the next prompt, and returns its place in the stream. score: as in ``PromptSampler``."""
        self.session, self.stream, self.sampling = session, stream, sampling
        self.next_place, self.score = next_place, score
        self.num_samples = config.rollout.num_samples
        self.size = config.ppo.prompts_per_iteration * self.num_samples
        self.num_tokens = config.ppo.window_tokens or config.rollout.max_tokens
        """Of a window; without ppo.window_tokens unfinished responses of a run that had it get all that is left."""
        self.baseline = config.ppo.advantage.baseline
        self.takes_over = config.ppo.window_tokens is not None or self.baseline == "critic"
        """Whether a batch may have parts of groups."""
        self.unfinished: list[Started] = []
        self.begun: list[int] = [0, self.num_samples]
        """Place of the prompt that was taken last, and how many of its samples are started."""
        self.so_far: dict[Sample, Rollout] | None = None
        """What this rank has of the unfinished responses; None: it is to be read from the stored batch before."""

    def next_batch(self, iteration: int) -> RolloutPart:
        """What this rank has of the iteration's batch: scored responses, and unfinished ones that have no reward.

        Raises Stopped on every rank if any was asked to stop; then the windows so far are stored.
        """
        session, current = self.session, self.session.runtime
        so_far = self._read(iteration - 1) if self.so_far is None else self.so_far
        batch = [*self.unfinished, *self._start(self.size - len(self.unfinished), iteration)]
        owners = owners_of(batch, self._holders(so_far), current.dp_size)
        places = {
            started.sample: place
            for place, (started, owner) in enumerate(zip(batch, owners, strict=True))
            if session.is_leader and owner == current.dp_rank
        }
        part = session.batches.stored_samples(iteration, {started.sample for started in batch}, places, so_far)
        if part is None:

            def plan(client: RolloutClient) -> list[PendingRequest]:
                return [
                    client.plan_window(place, *self._request(batch[place], so_far), self.num_tokens)
                    for place in places.values()
                ]

            pending = session.begin(places, plan, BatchNumber.training(iteration), self.sampling)
            part = self.score(session.collect(pending))
            session.batches.store(iteration, part)
        left = torch.zeros(len(batch), dtype=torch.int64)
        for place, rollout in part.items():
            left[place] = rollout.unfinished
        left = runtime.max_over_ranks(left)
        self.so_far = {(r.prompt.prompt_id, r.sample_index): r for r in part.rollouts if r.unfinished}
        self.unfinished = [batch[place] for place in left.nonzero().flatten().tolist()]
        return part

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; empty where every response is finished."""
        started = [[one.place, one.number, one.sample_index] for one in self.unfinished]
        is_open = self.begun[1] < self.num_samples
        return {"windows": {"unfinished": started, "begun": [*self.begun]}} if started or is_open else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, after the stream did.

        A group baseline, for which windows must be off, compares whole groups: then unfinished responses are dropped.
        """
        none = {"unfinished": [], "begun": [0, self.num_samples]}
        found = state.get("windows", none)
        if not self.takes_over and found["unfinished"]:
            if self.session.runtime.is_main:
                why = f"ppo.advantage.baseline {self.baseline} needs whole groups"
                say(f"warning: {len(found['unfinished'])} unfinished responses are dropped: {why}")
            found = none
        self.unfinished = [
            Started(place, number, sample_index, self.stream.at(place))
            for place, number, sample_index in found["unfinished"]
        ]
        self.begun, self.so_far = [*found["begun"]], None

    def _start(self, count: int, iteration: int) -> list[Started]:
        """The next responses, sample by sample."""
        started: list[Started] = []
        while len(started) < count:
            if self.begun[1] >= self.num_samples:  # more only if rollout.num_samples was lowered
                self.begun = [self.next_place(), 0]
            place, sample_index = self.begun
            started.append(Started(place, iteration, sample_index, self.stream.at(place)))
            self.begun[1] += 1
        return started

    def _request(self, started: Started, so_far: dict[Sample, Rollout]) -> tuple[Prompt, int, int, Rollout | None]:
        return started.prompt, started.sample_index, started.number, so_far.get(started.sample)

    def _read(self, iteration: int) -> dict[Sample, Rollout]:
        """What this rank gets of the unfinished responses, which leaders take in turn, from a stored batch.

        If that is gone they begin again.
        """
        current, found, problem = self.session.runtime, RolloutPart(), ""
        mine = {one.sample for one in self.unfinished[current.dp_rank :: current.dp_size]}
        if self.session.is_leader and self.unfinished:
            try:
                found = read_places(
                    self.session.batches.folder,
                    iteration,
                    lambda _, rollout: rollout.unfinished and (rollout.prompt.prompt_id, rollout.sample_index) in mine,
                )
            except UserError as error:
                problem = str(error)
        num_lost = len(self.unfinished) - runtime.sum_over_ranks(len(found))
        if num_lost and current.is_main:
            say(f"warning: {num_lost} unfinished responses begin again: {problem or 'they are not stored'}")
        return {(rollout.prompt.prompt_id, rollout.sample_index): rollout for rollout in found.rollouts}

    def _holders(self, so_far: dict[Sample, Rollout]) -> list[int]:
        """Which leader has each unfinished response; -1: none."""
        current = self.session.runtime
        here = [current.dp_rank if started.sample in so_far else -1 for started in self.unfinished]
        return runtime.max_over_ranks(torch.tensor(here, dtype=torch.int64)).tolist() if here else []


def owners_of(batch: Sequence[Started], holders: Sequence[int], num_leaders: int) -> list[int]:
    """Which leader gets each response of a batch: its holder or, in turn, the leader with the fewest so far.

    holders: of the first responses of the batch, -1 where nobody has anything of one.
    """
    owners = [*holders, *(-1 for _ in range(len(batch) - len(holders)))]
    counts = [owners.count(leader) for leader in range(num_leaders)]
    for place, owner in enumerate(owners):
        if owner < 0:
            owners[place] = counts.index(min(counts))
            counts[owners[place]] += 1
    return owners
