"""Where a stage's rollouts come from: engines with the actor's weights, verifiers, and the store of the run.

A stop request ends the wait for responses within a second. What is finished by then is stored, and the next attempt
asks the engines for the rest only: seeds belong to requests, so the iteration gets the responses it would have had.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import engine_nodes, engine_placement
from megatron_vcppo.data.prompts import PromptKeys, load_prompts
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.registry import check_answer, isolation_of_code, resolve_verifiers
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.rollout.client import RequestId, RolloutClient
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.rollout_store import drop_partial, read_partial, read_rollouts, write_partial, write_rollouts
from megatron_vcppo.run.startup import startup
from megatron_vcppo.run.stored_set import needs_engines
from megatron_vcppo.stages.shared_gpus import Model, SharedGpus
from megatron_vcppo.stages.stopping import Saved, stopping
from megatron_vcppo.weight_sync.joiners import begin, finish_with_joiners
from megatron_vcppo.weight_sync.rank_role import make_weight_sync, role_of
from megatron_vcppo.weight_sync.sync import PushResult, WeightSync

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(eq=False)
class PendingRollouts:
    """Generation under way."""

    prompts: list[Prompt]
    policy_version: int
    tag: int
    """Under which what is finished is stored if the stage is asked to stop."""
    future: Future[list[Rollout]] | None = None
    """On leaders with prompts of their own."""
    answered: list[tuple[Rollout, Future[Rollout]]] = field(default_factory=list)
    """This leader's responses so far, each with its scored form."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def finished(self) -> list[Rollout]:
        """This leader's responses so far, scored where the verdict is there."""
        return [
            scored.result() if scored.done() and not scored.cancelled() and not scored.exception() else rollout
            for rollout, scored in list(self.answered)
        ]


class RolloutSession(AbstractContextManager["RolloutSession"]):
    """Pushes weights and collects scored rollouts. Every method is collective over the trainer's ranks.

    Each data-parallel replica has a leader (its first tensor, pipeline and context rank), which asks the engines for
    its share of the prompts and scores the responses as they arrive.
    """

    def __init__(self, config: Config, folder: Path, world: runtime.Runtime) -> None:
        self.config, self.world = config, world
        self.rollouts = folder / "rollouts"
        """Where they are stored."""
        positions = Architecture.from_hf(config.model.hf).max_positions
        if config.model.max_length > positions:
            raise UserError(
                f"model.max_length {config.model.max_length} is more than the {positions} positions of "
                f"{config.model.hf}, which engines refuse"
            )
        self.tokenizer = load_tokenizer(config.model.hf)
        rendezvous = folder / "rendezvous"
        self.stage = folder.name
        self.gpus: SharedGpus | None = None
        """Where the engines have the trainer's GPUs."""
        if engine_placement(config) == "trainer_gpus":
            self.gpus = SharedGpus(config, folder, world)
            self.sync: WeightSync = self.gpus.sync
        else:
            place = role_of(world.pp_rank, world.pp_size, world.tp_rank, world.dp_rank, world.cp_rank)
            self.sync = make_weight_sync(config, rendezvous, place, world.device)
        self.is_leader = world.tp_rank == world.pp_rank == world.cp_rank == 0
        self.scorer: Scorer | None = None
        self.client: RolloutClient | None = None
        self.verifiers = resolve_verifiers(config.prompts.verifiers, config.rewards.code)
        """By the task that can be judged; every rank knows them, because all must read the same prompts."""
        if self.is_leader:
            keys = config.prompts
            self.scorer = Scorer(keys.verify_workers, keys.verify_timeout_s, keys.verifiers, config.rewards.code)
            self.client = RolloutClient(
                rendezvous,
                config.rollout,
                config.model.max_length,
                config.run.seed,
                decode=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True),
                show_progress=world.is_main,
            )
        self._prompts: dict[str, list[Prompt]] = {}
        self.policy_version = -1
        self.under_way: list[PendingRollouts] = []
        self.source: Callable[[], Tensors] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
        startup.done("push")
        return result

    def generate(
        self, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int, tag: int | None = None
    ) -> list[Rollout]:
        """Scored rollouts under the pushed weights, by prompt and sample; the same list on every rank.

        tag: what they are stored under if it is not the iteration, from which seeds are made. Raises Stopped on every
        rank if any was asked to stop; then the responses so far are stored.
        """
        return self.finish(self.begin(prompts, iteration, sampling, num_samples, tag))

    def begin(
        self, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int, tag: int | None = None
    ) -> PendingRollouts:
        """Have the engines work on it while this rank does something else; no push until it is finished.

        They are not asked for responses that an attempt before this one kept.
        """
        if self.gpus is not None and not self.gpus.engines_have_it:
            assert self.source is not None, "generation before the first push"
            self.push(self.policy_version, self.source)
        begun = PendingRollouts(prompts, self.policy_version, iteration if tag is None else tag)
        mine = prompts[self.world.dp_rank :: self.world.dp_size]
        if self.is_leader and mine:
            begun.future = begin(self._producer(begun, mine, iteration, sampling, num_samples))
        self.under_way.append(begun)
        return begun

    def finish(self, begun: PendingRollouts) -> list[Rollout]:
        """Wait for it. An engine that is restarted while all wait gets the actor's current weights."""
        assert self.source is not None and begun.policy_version == self.policy_version, "engines hold other weights"
        try:
            scored = finish_with_joiners(self.sync, self.policy_version, self.source, begun.future, stopping.requested)
        except Stopped:
            self.keep_finished()
            raise
        self.under_way.remove(begun)
        parts = self.sync.exchange((scored or [], self.scorer.take_problems() if self.scorer else []))
        if self.world.is_main:
            for problem in (problem for _, problems in parts for problem in problems):
                print(f"warning: verifier: {problem}", flush=True)
        order = {prompt.prompt_id: place for place, prompt in enumerate(begun.prompts)}
        rollouts = [rollout for part, _ in parts for rollout in part]
        return sorted(rollouts, key=lambda rollout: (order[rollout.prompt.prompt_id], rollout.sample_index))

    def keep_finished(self) -> None:
        """End what is under way and store what is finished of it, each leader its own share; collective.

        Models are whole again afterwards, so that the stage can save them.
        """
        for begun in self.under_way:
            begun.cancelled.set()
            if finished := begun.finished():
                write_partial(self.rollouts, begun.tag, finished, self.world.dp_rank, self.world.dp_size)
        self.under_way.clear()
        self.sync.exchange(None)
        self.trainer_turn()

    def forget(self, tag: int) -> None:
        """Drop what was kept under a tag whose rollouts are complete and are not stored; main rank."""
        if self.world.is_main:
            drop_partial(self.rollouts, tag)

    def _producer(
        self, begun: PendingRollouts, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int
    ) -> Callable[[], list[Rollout]]:
        client, scorer, version = self.client, self.scorer, self.policy_version
        assert client is not None and scorer is not None

        def take(rollout: Rollout) -> None:
            begun.answered.append((rollout, scorer.submit(rollout)))

        known: set[RequestId] = set()
        if kept := read_partial(self.rollouts, begun.tag):
            plan = client.plan(prompts, iteration, num_samples)
            wanted = {(item.prompt.prompt_id, item.sample_index, item.request.seed) for item in plan}
            for rollout in kept:
                if (request := (rollout.prompt.prompt_id, rollout.sample_index, rollout.seed)) in wanted:
                    known.add(request)
                    begun.answered.append((rollout, scored_before(rollout) or scorer.submit(rollout)))

        def produce() -> list[Rollout]:
            client.generate(
                *(prompts, iteration, version, sampling, num_samples),
                on_rollout=take,
                known=known,
                cancelled=begun.cancelled.is_set,
            )
            return [scored.result() for _, scored in begun.answered]

        return produce

    def store(self, iteration: int, rollouts: list[Rollout]) -> None:
        """Keep an iteration's rollouts: main rank writes, all wait."""
        if self.world.is_main:
            write_rollouts(self.rollouts, iteration, rollouts)
            drop_partial(self.rollouts, iteration)
        self.sync.exchange(None)

    def stored(self, iteration: int, prompts: list[Prompt], num_samples: int) -> list[Rollout] | None:
        """The stored rollouts of exactly these prompts; None if there are none. An iteration that a kill cut off is
        trained on the responses that it had, so its updates come out the same."""
        found: list[Rollout] | None = None
        if self.world.is_main:
            try:
                found = read_rollouts(self.rollouts, iteration)
                drop_partial(self.rollouts, iteration)  # a kill may have come between the two
            except UserError:
                found = None
            wanted = [(prompt.prompt_id, sample) for prompt in prompts for sample in range(num_samples)]
            if found is not None and [(r.prompt.prompt_id, r.sample_index) for r in found] != wanted:
                found = None
        return self.sync.exchange(found)[0]

    def prompts(self, source: str) -> list[Prompt]:
        """The problems of a source; what is wrong with it is printed or raised, once. Every rank reads it."""
        if source in self._prompts:
            return self._prompts[source]
        keys = self.config.prompts
        prompts, report = load_prompts(
            source,
            self.tokenizer,
            self.config.model.max_length - 1,
            keys.bad_samples,
            PromptKeys(keys.prompt_key, keys.answer_key, keys.task_key, keys.task or ""),
            known_tasks=self.verifiers,
            check_answer=partial(check_answer, self.verifiers),
        )
        isolation = isolation_of_code(self.verifiers, {prompt.task for prompt in prompts})
        if self.world.is_main:
            print(report, flush=True)
            if isolation:
                print(f"programs of the model are run under isolation: {isolation}", flush=True)
        self._prompts[source] = prompts
        return prompts


def scored_before(rollout: Rollout) -> Future[Rollout] | None:
    """As the scorer returns it, for a rollout that has its verdict; else None."""
    if rollout.reward is None:
        return None
    future: Future[Rollout] = Future()
    future.set_result(rollout)
    return future
