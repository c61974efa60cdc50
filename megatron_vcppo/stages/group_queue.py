"""Prompts that the engines work on ahead of training: which iteration takes which, and what is kept at a stop.

A group is all samples of one prompt. Every rank knows the same groups; only their leaders have requests and responses.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from megatron_vcppo.data.rollout_share import RolloutTable
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rollout.client import RolloutStream
from megatron_vcppo.rollout.generation import PendingRequest
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.stages.rollout_session import RolloutSession, scored_before
from megatron_vcppo.stages.stopping import stopping
from megatron_vcppo.weight_sync.sync import WeightSyncError, log

POLL_S = 0.1
"""How often the ranks agree on what is finished."""
POLLS_PER_LOOK = 10
"""How many of these come between two looks for engines that were restarted."""


@dataclass(frozen=True)
class Group:
    """All samples of one prompt, from when it is taken from the stream until it is trained on."""

    place: int
    """Of the prompt in the stream."""
    number: int
    """Stands for the iteration where its sampling seeds are derived."""
    prompt: Prompt


@dataclass(frozen=True)
class GroupState:
    """How far a group is."""

    begun_under: int | None
    """The lowest policy version under which a sample was given to an engine; None: none was."""
    finished: bool

    def packed(self) -> int:
        """As one number; 0 is a group that nobody has begun."""
        return 0 if self.begun_under is None else 2 * (self.begun_under + 1) + self.finished

    @classmethod
    def unpacked(cls, number: int) -> "GroupState":
        """The opposite of ``packed``."""
        return cls(number // 2 - 1, bool(number % 2)) if number else cls(None, False)


def choose_groups(
    states: Sequence[GroupState], count: int, iteration: int, staleness: int, *, wait_for_due: bool = True
) -> list[int] | None:
    """The groups that an iteration trains on: the first ``count`` finished ones by (version begun under, place in the
    stream); indices, rising. None: it has to wait.

    wait_for_due: it also waits if a later iteration would otherwise get more groups that are due than it can take. A
    group begun under version v is due at iteration v + 1 + staleness.
    """
    begun = [(state.begun_under, index) for index, state in enumerate(states) if state.begun_under is not None]
    chosen = sorted(index for _, index in sorted(one for one in begun if states[one[1]].finished)[:count])
    if len(chosen) < count:
        return None
    if wait_for_due:
        taken = set(chosen)
        for version in {version for version, _ in begun}:
            older = {index for other, index in begun if other <= version}
            room = count * max(0, version + 1 + staleness - iteration)
            # More than count are due only if settings were changed: then the oldest ones come first.
            if len(older & taken) < min(count, len(older) - room):
                return None
    return chosen


@dataclass(eq=False)
class _Requested:
    """A group of this leader."""

    requests: list[PendingRequest]
    """Without those that an attempt before has answered."""
    answered: list[tuple[Rollout, Future[Rollout]]] = field(default_factory=list)
    """Responses so far, each with its scored form."""

    def state(self, num_samples: int) -> GroupState:
        answered = list(self.answered)
        versions = [rollout.policy_version for rollout, _ in answered]
        versions += [request.begun_under for request in self.requests if request.begun_under is not None]
        finished = len(answered) == num_samples and all(scored.done() for _, scored in answered)
        return GroupState(min(versions, default=None), finished)

    def scored(self) -> list[Rollout]:
        """Scored where the verdict is there."""
        return [
            scored.result() if scored.done() and not scored.cancelled() and not scored.exception() else rollout
            for rollout, scored in list(self.answered)
        ]


class GroupQueue:
    """The engines' work ahead. Methods are collective, but for those of ``WorkAhead``, which the session calls."""

    def __init__(self, session: RolloutSession, sampling: Sampling, num_samples: int) -> None:
        self.session, self.sampling, self.num_samples = session, sampling, num_samples
        self.mine: dict[int, _Requested] = {}
        """By place in the stream."""
        self.requested: set[int] = set()
        """Places of all leaders' groups."""
        self.stream: RolloutStream | None = None
        self.storage = 0
        """The number under which what is finished is stored at a stop: of the next batch that is collected."""
        session.ahead = self

    def request(self, groups: Sequence[Group], iteration: int) -> None:
        """Have the engines work on those of the groups that they have not got yet, in this order.

        Responses that an attempt before kept for the iteration are not generated again.
        """
        session, self.storage = self.session, iteration
        new = [group for group in groups if group.place not in self.requested]
        self.requested.update(group.place for group in new)
        client, scorer = session.client, session.scorer
        if client is None or scorer is None:
            return
        if self.stream is None:
            self.stream = client.stream(session.policy_version, self.sampling)
        kept = {(r.prompt.prompt_id, r.sample_index, r.seed): r for r in session.batches.kept(iteration)}
        for group in new:
            if group.place % session.runtime.dp_size != session.runtime.dp_rank:
                continue
            requests = client.plan([group.prompt], group.number, self.num_samples)
            known = [kept.get((group.prompt.prompt_id, r.sample_index, r.request.seed)) for r in requests]
            missing = [request for request, rollout in zip(requests, known, strict=True) if rollout is None]
            entry = self.mine[group.place] = _Requested(missing)
            for rollout in known:
                if rollout is not None:
                    entry.answered.append((rollout, scored_before(rollout) or scorer.submit(rollout)))
            for request in missing:
                self.stream.add(request, self._taker(entry))

    def _taker(self, entry: _Requested) -> Callable[[Rollout], None]:
        scorer = self.session.scorer
        assert scorer is not None
        return lambda rollout: entry.answered.append((rollout, scorer.submit(rollout)))

    def collect(
        self, groups: Sequence[Group], choose: Callable[[Sequence[GroupState]], list[int] | None]
    ) -> tuple[list[int], RolloutPart]:
        """Wait until ``choose`` takes some of the groups; its choice, and what this rank has of their scored rollouts.

        Not between an update and the push of its weights: engines that restart meanwhile receive the actor's. Raises
        Stopped on every rank if any was asked to stop; then the responses so far are stored.
        """
        polls = 0
        progress = Progress("groups", len(groups), unit="groups") if self.session.runtime.is_main else None
        while (chosen := choose(states := self._states(groups))) is None:
            if progress is not None:
                finished = sum(state.finished for state in states)
                begun = sum(state.begun_under is not None for state in states)
                progress.update(finished, finished - progress.position, {"running": begun - finished})
            time.sleep(POLL_S)
            polls += 1
            if polls % POLLS_PER_LOOK == 0:
                self._tend_engines()
        found: list[tuple[int, Rollout]] = []
        for number, index in enumerate(chosen):
            self.requested.discard(groups[index].place)
            if (entry := self.mine.pop(groups[index].place, None)) is not None:
                rollouts = [scored.result() for _, scored in entry.answered]
                found += [(number * self.num_samples + rollout.sample_index, rollout) for rollout in rollouts]
        self.storage += 1
        self.session.report_verifier_problems()
        return chosen, RolloutPart.of(found)

    def settle(self) -> None:
        """Wait until every response that is begun is finished, and begin no others until weights are pushed.

        Engines that restart meanwhile wait for that push: the actor has moved on from the weights that the others hold.
        Raises Stopped on every rank if any was asked to stop.
        """
        if self.stream is not None:
            self.stream.held = True
        while self._agree([self.stream.num_running if self.stream is not None else 0])[0]:
            time.sleep(POLL_S)

    def _tend_engines(self) -> None:
        session = self.session
        assert session.source is not None, "generation before the first push"
        try:
            session.sync.update_joiners(session.policy_version, session.source)
        except WeightSyncError as error:
            log.warning("%s; its supervisor starts it again", error)

    def _states(self, groups: Sequence[Group]) -> list[GroupState]:
        """The same on every rank."""
        mine = [self.mine.get(group.place) for group in groups]
        packed = [entry.state(self.num_samples).packed() if entry is not None else 0 for entry in mine]
        return [GroupState.unpacked(number) for number in self._agree(packed)]

    def _agree(self, numbers: list[int]) -> list[int]:
        """The largest of each over the ranks. Raises on every rank if generation failed or one was asked to stop."""
        failure = self.stream.failure if self.stream is not None else None
        flags = [int(failure is not None), int(stopping.requested())]
        failed, stop, *largest = runtime.max_over_ranks(torch.tensor(flags + numbers)).tolist()
        if failed:
            if failure is not None:
                raise failure
            raise RuntimeError("generation failed on another rank")
        if stop:
            self.session.keep_finished()
            raise Stopped
        return largest

    def set_version(self, policy_version: int) -> None:
        """Engines hold this version now."""
        if self.stream is not None:
            self.stream.policy_version, self.stream.held = policy_version, False

    def stop(self) -> tuple[int, list[Rollout]]:
        """End the work; the number under which to store what is finished, and this leader's finished responses."""
        if self.stream is not None:
            self.stream.close()
        finished = [rollout for entry in self.mine.values() for rollout in entry.scored()]
        self.mine.clear()
        return self.storage, finished


def age_metrics(part: RolloutPart, batch: RolloutTable, policy_version: int) -> dict[str, float]:
    """How many updates the tokens of a batch are behind the actor, and how many responses span a push; collective.

    part: what this rank has of the batch from the engines. policy_version: of the actor before its update. Tokens are
    those that no iteration before has trained on.
    """
    ages = [(policy_version - version, count) for rollout in part.rollouts for version, count in rollout.versions()]
    oldest = runtime.max_over_ranks(torch.tensor(max((age for age, _ in ages), default=0)))
    return {
        "rollout/staleness_mean": runtime.sum_over_ranks(sum(age * count for age, count in ages))
        / int(batch.lengths.sum() - batch.rows["trained_length"].sum()),
        "rollout/staleness_max": float(oldest),
        "rollout/spans_push": runtime.sum_over_ranks(sum(bool(r.version_changes) for r in part.rollouts)) / len(batch),
    }
