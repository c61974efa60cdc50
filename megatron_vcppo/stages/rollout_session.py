"""Where a stage's rollouts come from: engines with the actor's weights, verifiers, and the store of the run.

A stop request ends the wait for responses within a second. What is finished by then is stored, and the next attempt
asks the engines for the rest only: seeds belong to requests, so the iteration gets the responses it would have had.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from megatron_vcppo.config.placement import engine_nodes, engine_placement
from megatron_vcppo.data.mixture import Mixture, join_prompts, training_sources
from megatron_vcppo.data.prompt_format import PromptFormat
from megatron_vcppo.data.prompts import PromptKeys, PromptStream, load_prompts
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rewards.registry import check_answer, isolation_of_code, resolve_verifiers
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.generation import PendingRequest
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.rollout.turns import ToolCalls
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import (
    needs_engines,
    rollouts_folder,
)
from megatron_vcppo.stages.shared_gpus import Model, SharedGpus
from megatron_vcppo.stages.stage import Stage
from megatron_vcppo.stages.stopping import Saved, stopping
from megatron_vcppo.stages.stored_batches import Sample, StoredBatches
from megatron_vcppo.weight_sync.joiners import begin, finish_with_joiners
from megatron_vcppo.weight_sync.rank_role import make_weight_sync, role_of
from megatron_vcppo.weight_sync.sync import PushResult, WeightSync

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class BatchNumber:
    """The two numbers of a batch of rollouts that the engines generate."""

    seed: int
    """Stands for the iteration where sampling seeds are derived."""
    storage: int
    """Under which the batch, or what is finished of it at a stop, is stored."""

    @classmethod
    def training(cls, number: int) -> "BatchNumber":
        """Of the iteration or step of this number, from 1."""
        return cls(number, number)

    @classmethod
    def evaluation(cls, iteration: int) -> "BatchNumber":
        """Of the held-out problems after an iteration: negative, so that neither meets those of training."""
        return cls(-1 - iteration, -1 - iteration)

    @classmethod
    def candidate(cls, version: int) -> "BatchNumber":
        """Of checkpoint ``version`` in the stage evaluate, from 0: all candidates get the same seeds."""
        return cls(cls.evaluation(0).seed, version)


@dataclass(eq=False)
class PendingRollouts:
    """A batch that the engines work on."""

    places: Mapping[Sample, int]
    """Each rollout that this rank is to get → its place in the batch."""
    policy_version: int
    number: BatchNumber
    future: Future[list[Rollout]] | None = None
    """Set only on leader ranks that were assigned prompts."""
    answered: list[tuple[Rollout, Future[Rollout]]] = field(default_factory=list)
    """This leader's responses so far, each with its scored form."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def finished(self) -> RolloutPart:
        """This leader's responses so far, scored where the verdict is there."""
        return self.part_of(
            scored.result() if scored.done() and not scored.cancelled() and not scored.exception() else rollout
            for rollout, scored in list(self.answered)
        )

    def part_of(self, rollouts: Iterable[Rollout]) -> RolloutPart:
        """Responses of this batch, with their places."""
        return RolloutPart.of((self.places[r.prompt.prompt_id, r.sample_index], r) for r in rollouts)


class WorkAhead(Protocol):
    """What engines work on through pushes, for iterations to come (stages/group_queue.py)."""

    def set_version(self, policy_version: int) -> None:
        """Engines hold this version now."""

    def stop(self) -> tuple[int, list[Rollout]]:
        """End the work; the number under which to store what is finished, and this leader's finished responses."""


class RolloutSession(AbstractContextManager["RolloutSession"]):
    """Pushes weights and collects scored rollouts. Every method is collective over the trainer's ranks.

    Each data-parallel replica has a leader (its first tensor, pipeline and context rank), which asks the engines for
    its part of the prompts, scores the responses as they arrive, and stores them. Other ranks get none: what a method
    returns there is empty.
    """

    def __init__(self, stage: Stage) -> None:
        """Raises UserError if the model is too short for model.max_length."""
        config, runtime = stage.config, stage.runtime
        self.config, self.runtime, self.stage = config, runtime, stage.name
        self.replays_routing = stage.name == "ppo" and config.ppo.routing_replay
        """Whether rollouts for training need the experts that the engine chose."""
        positions = Architecture.from_hf(config.model.hf).max_positions
        if config.model.max_length > positions:
            raise UserError(
                f"model.max_length {config.model.max_length} is more than the {positions} positions of "
                f"{config.model.hf}, which engines refuse"
            )
        self.tokenizer = load_tokenizer(config.model.hf)
        rendezvous = stage.folder.rendezvous
        self.gpus: SharedGpus | None = None
        """Where the engines have the trainer's GPUs."""
        if engine_placement(config) == "trainer_gpus":
            self.gpus = SharedGpus(stage)
            self.sync: WeightSync = self.gpus.sync
        else:
            role = role_of(runtime, config.weight_sync.max_senders)
            self.sync = make_weight_sync(config, rendezvous, role, runtime.device)
        self.is_leader = runtime.is_leader
        self.batches = StoredBatches(
            rollouts_folder(config, stage.name), runtime, self.sync.ranks, need_experts=self.replays_routing
        )
        self.scorer: Scorer | None = None
        self.client: RolloutClient | None = None
        self.verifiers = resolve_verifiers(config.prompts.verifiers, config.rewards.code)
        """By the task that can be judged; every rank knows them, because all must read the same prompts."""
        if self.is_leader:
            self.scorer = Scorer(
                config.prompts.verify_workers,
                config.prompts.verify_timeout_s,
                config.prompts.verifiers,
                config.rewards.code,
                config.prompts.verify_memory_mib,
                config.prompts.tools,
            )
            self.client = RolloutClient(
                rendezvous,
                config.rollout,
                config.model.max_length,
                config.run.seed,
                decode=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True),
                show_progress=runtime.is_main,
                tools=ToolCalls(
                    self.scorer.tool_stops,
                    self.scorer.call_tool,
                    lambda text: self.tokenizer.encode(text, add_special_tokens=False),
                    config.prompts.max_tool_calls,
                ),
            )
        self._prompts: dict[str, list[Prompt]] = {}
        self.policy_version = -1
        self.pending: list[PendingRollouts] = []
        self.ahead: WorkAhead | None = None
        self.source: Callable[[], Tensors] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.ahead is not None:
            self.ahead.stop()
        if self.scorer is not None:
            self.scorer.close(finish=kind is None)
        if self.gpus is not None:
            self.gpus.close()

    def start_engines(self) -> None:
        """Before any model is built: engines on the trainer's GPUs start while these are empty, and go to sleep.

        Elsewhere they start meanwhile, and ``wait_for_engines`` waits for them. Raises Saved if asked to stop.
        """
        if self.gpus is not None and needs_engines(self.config, self.stage):
            self.gpus.begin()
            try:
                self._wait_for_engines()
            except Stopped:
                raise Saved("asked to stop: the stage had not begun") from None
            self.gpus.to_trainer()

    def wait_for_engines(self) -> None:
        """Until every engine of every rollout node has answered once. Raises Stopped if any rank was asked to stop."""
        if self.gpus is None:
            self._wait_for_engines()

    def share(self, *models: Model | None) -> None:
        """Models whose memory engines on the trainer's GPUs need for their turn."""
        if self.gpus is not None:
            self.gpus.share(*models)

    def trainer_turn(self) -> None:
        """Engines on the trainer's GPUs sleep until the next push or generation; models may be used again."""
        if self.gpus is not None:
            self.gpus.to_trainer()

    def _wait_for_engines(self) -> None:
        count = engine_nodes(self.config) * self.config.rollout.engine.per_node
        self.sync.wait_for_engines(count, self.config.rollout.start_timeout_s, stopping.requested)
        startup.done("engines")

    def push(self, policy_version: int, source: Callable[[], Tensors]) -> PushResult:
        """Give every engine these weights; source: see weight_sync."""
        self.policy_version, self.source = policy_version, source
        if self.gpus is not None:
            self.gpus.to_engines()
        result = self.sync.sync(policy_version, source)
        if self.ahead is not None:
            self.ahead.set_version(policy_version)
        startup.done("push")
        return result

    def generate(self, prompts: list[Prompt], number: BatchNumber, sampling: Sampling, num_samples: int) -> RolloutPart:
        """Scored rollouts under the pushed weights; their places are by prompt and sample.

        Raises Stopped on every rank if any was asked to stop; then the responses so far are stored.
        """
        return self.collect(self.request(prompts, number, sampling, num_samples))

    def request(
        self, prompts: list[Prompt], number: BatchNumber, sampling: Sampling, num_samples: int
    ) -> PendingRollouts:
        """Have the engines work on it while this rank does something else; no push until it is collected.

        Responses that an attempt before this one kept are not generated again.
        """
        mine = prompts[self.runtime.dp_rank :: self.runtime.dp_size]
        places = self.batches.places_of(prompts, num_samples)
        return self.begin(places, lambda client: client.plan(mine, number.seed, num_samples), number, sampling)

    def begin(
        self,
        places: Mapping[Sample, int],
        plan: Callable[[RolloutClient], list[PendingRequest]],
        number: BatchNumber,
        sampling: Sampling,
    ) -> PendingRollouts:
        """``request`` for a batch of any samples. places: those of this rank; plan: makes their requests."""
        if self.gpus is not None and not self.gpus.engines_have_it:
            assert self.source is not None, "generation before the first push"
            self.push(self.policy_version, self.source)
        pending = PendingRollouts(places, self.policy_version, number)
        if places:
            assert self.client is not None, "requests on a rank that is no leader"
            pending.future = begin(self._producer(pending, self.client, plan(self.client), sampling))
        self.pending.append(pending)
        return pending

    def collect(self, pending: PendingRollouts) -> RolloutPart:
        """Wait for the pending rollouts; engines that restart meanwhile receive the current weights."""
        assert self.source is not None and pending.policy_version == self.policy_version, "engines hold other weights"
        try:
            scored = finish_with_joiners(
                self.sync, self.policy_version, self.source, pending.future, stopping.requested
            )
        except Stopped:
            self.keep_finished()
            raise
        self.pending.remove(pending)
        self.report_verifier_problems()
        return pending.part_of(scored or ())

    def report_verifier_problems(self) -> None:
        """Print what the leaders' verifiers had to report since the last call; collective."""
        for _, problems in self.sync.ranks.texts("\n".join(self.scorer.take_problems() if self.scorer else [])):
            if self.runtime.is_main:
                for problem in problems.splitlines():
                    say(f"warning: verifier: {problem}")

    def keep_finished(self) -> None:
        """End what is pending and store what is finished of it, each leader its own part; collective.

        Models are whole again afterwards, so that the stage can save them.
        """
        self.batches.finish()
        for pending in self.pending:
            pending.cancelled.set()
            self.batches.keep(pending.number.storage, pending.finished())
        self.pending.clear()
        if self.ahead is not None:
            storage, rollouts = self.ahead.stop()
            self.batches.keep(storage, RolloutPart.whole(rollouts))
        self.sync.ranks.barrier()
        self.trainer_turn()

    def _producer(
        self, pending: PendingRollouts, client: RolloutClient, requests: list[PendingRequest], sampling: Sampling
    ) -> Callable[[], list[Rollout]]:
        scorer, version = self.scorer, self.policy_version
        assert scorer is not None

        def score(rollout: Rollout) -> None:
            pending.answered.append((rollout, scored_before(rollout) or scorer.submit(rollout)))

        missing = {item.request_id: item for item in requests}
        for rollout in self.batches.kept(pending.number.storage):
            request_id = rollout.prompt.prompt_id, rollout.sample_index, rollout.seed
            if request_id in missing and rollout.continues(missing[request_id].so_far):
                del missing[request_id]
                score(rollout)

        def produce() -> list[Rollout]:
            client.answer([*missing.values()], version, sampling, score, pending.cancelled.is_set)
            return [scored.result() for _, scored in pending.answered]

        return produce

    def training_prompts(self, seed: int) -> PromptStream:
        """The problems of prompts.train and prompts.mix, in every epoch as often as their source's weight says."""
        weights = training_sources(self.config.prompts.train, self.config.prompts.mix)
        loaded = [self.prompts(source) for source in weights]
        mixture = Mixture([(len(part), weight) for part, weight in zip(loaded, weights.values(), strict=True)], seed)
        return PromptStream(join_prompts(loaded), seed, mixture)

    def prompts(self, source: str) -> list[Prompt]:
        """The problems of a source; what is wrong with it is printed or raised, once. Every rank reads it."""
        if source in self._prompts:
            return self._prompts[source]
        prompts_config = self.config.prompts
        prompts, report = load_prompts(
            source,
            self.tokenizer,
            self.config.model.max_length - 1,
            prompts_config.bad_samples,
            PromptKeys.of(prompts_config),
            known_tasks=self.verifiers,
            check_answer=partial(check_answer, self.verifiers),
            how=PromptFormat.of(prompts_config),
        )
        isolation = isolation_of_code(self.verifiers, {prompt.task for prompt in prompts})
        if self.runtime.is_main:
            say(str(report))
            if isolation:
                say(f"programs of the model are run under isolation: {isolation}")
        self._prompts[source] = prompts
        return prompts


def scored_before(rollout: Rollout) -> Future[Rollout] | None:
    """As the scorer returns it, for a rollout that has its verdict or, being unfinished, gets none yet; else None."""
    if rollout.reward is None and not rollout.unfinished:
        return None
    future: Future[Rollout] = Future()
    future.set_result(rollout)
    return future
