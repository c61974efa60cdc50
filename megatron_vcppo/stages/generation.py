"""Where a stage's rollouts come from: engines with the actor's weights, verifiers, and the store of the run."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import engine_nodes
from megatron_vcppo.data.prompts import PromptKeys, load_prompts
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.architecture import Architecture
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.registry import check_answer, isolation_of_code, resolve_verifiers
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.store import read_rollouts, write_rollouts
from megatron_vcppo.rollout.wire import Sampling
from megatron_vcppo.stages.startup import startup
from megatron_vcppo.weight_sync.generation import begin, finish_with_joiners
from megatron_vcppo.weight_sync.place import make_weight_sync, place_of
from megatron_vcppo.weight_sync.sync import PushResult

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Begun:
    """Generation under way."""

    prompts: list[Prompt]
    policy_version: int
    future: Future[list[Rollout]] | None
    """On leaders with prompts of their own."""


class Generation(AbstractContextManager["Generation"]):
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
        place = place_of(world.pp_rank, world.pp_size, world.tp_rank, world.dp_rank, world.cp_rank)
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
        self.source: Callable[[], Tensors] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.scorer is not None:
            self.scorer.close(finish=kind is None)

    def wait_for_engines(self) -> None:
        """Until every engine of every rollout node has answered once."""
        count = engine_nodes(self.config) * self.config.rollout.engine.per_node
        self.sync.wait_for_engines(count, self.config.rollout.start_timeout_s)
        startup.done("engines")

    def push(self, policy_version: int, source: Callable[[], Tensors]) -> PushResult:
        """Give every engine these weights; source: see weight_sync."""
        self.policy_version, self.source = policy_version, source
        result = self.sync.sync(policy_version, source)
        startup.done("push")
        return result

    def generate(self, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int) -> list[Rollout]:
        """Scored rollouts under the pushed weights, by prompt and sample; the same list on every rank."""
        return self.finish(self.begin(prompts, iteration, sampling, num_samples))

    def begin(self, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int) -> "Begun":
        """Have the engines work on it while this rank does something else; no push until it is finished."""
        mine = prompts[self.world.dp_rank :: self.world.dp_size]
        produce = self._producer(mine, iteration, sampling, num_samples) if self.is_leader and mine else None
        return Begun(prompts, self.policy_version, begin(produce))

    def finish(self, begun: "Begun") -> list[Rollout]:
        """Wait for it. An engine that is restarted while all wait gets the actor's weights of now."""
        assert self.source is not None and begun.policy_version == self.policy_version, "engines hold other weights"
        scored = finish_with_joiners(self.sync, self.policy_version, self.source, begun.future)
        parts = self.sync.exchange((scored or [], self.scorer.take_problems() if self.scorer else []))
        if self.world.is_main:
            for problem in (problem for _, problems in parts for problem in problems):
                print(f"warning: verifier: {problem}", flush=True)
        order = {prompt.prompt_id: place for place, prompt in enumerate(begun.prompts)}
        rollouts = [rollout for part, _ in parts for rollout in part]
        return sorted(rollouts, key=lambda rollout: (order[rollout.prompt.prompt_id], rollout.sample_index))

    def _producer(
        self, prompts: list[Prompt], iteration: int, sampling: Sampling, num_samples: int
    ) -> Callable[[], list[Rollout]]:
        client, scorer, version = self.client, self.scorer, self.policy_version
        assert client is not None and scorer is not None

        def produce() -> list[Rollout]:
            futures: list[Future[Rollout]] = []
            client.generate(
                *(prompts, iteration, version, sampling, num_samples),
                on_rollout=lambda rollout: futures.append(scorer.submit(rollout)),
            )
            return [future.result() for future in futures]

        return produce

    def store(self, iteration: int, rollouts: list[Rollout]) -> None:
        """Keep an iteration's rollouts: main rank writes, all wait."""
        if self.world.is_main:
            write_rollouts(self.rollouts, iteration, rollouts)
        self.sync.exchange(None)

    def stored(self, iteration: int, prompts: list[Prompt], num_samples: int) -> list[Rollout] | None:
        """The stored rollouts of exactly these prompts; None if there are none. An iteration that a kill cut off is
        trained on the responses that it had, so its updates come out the same."""
        found: list[Rollout] | None = None
        if self.world.is_main:
            try:
                found = read_rollouts(self.rollouts, iteration)
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
