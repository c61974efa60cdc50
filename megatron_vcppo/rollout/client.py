"""Prompts in, rollouts out: plans requests with fixed seeds, and has the engines answer them (generation.py)."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_vcppo.config import RolloutConfig
from megatron_vcppo.data.seeds import sample_seed, turn_seed
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout import engine_http
from megatron_vcppo.rollout.fleet import Fleet
from megatron_vcppo.rollout.generation import Generation, PendingRequest
from megatron_vcppo.rollout.messages import GenerateRequest, Sampling
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.rollout.turns import ToolCalls, Turns
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.run.secret import read_secret

FOLLOW_S = 0.02
"""How often a stream looks for what was added to it."""


@dataclass
class RolloutClient:
    """Generates with the engines that are published in ``rendezvous``.

    ``decode`` turns response tokens into text: here, so that engines need not. ``on_rollout`` is called with each
    rollout as it arrives and must return at once (hand it to a pool). ``max_length`` bounds prompt plus response.
    """

    rendezvous: Path
    config: RolloutConfig
    max_length: int
    run_seed: int
    decode: Callable[[Sequence[int]], str]
    show_progress: bool = False
    tools: ToolCalls | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        iteration: int,
        policy_version: int,
        sampling: Sampling,
        num_samples: int,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """num_samples responses for each prompt, by prompt and sample index; see ``answer``."""
        return self.answer(self.plan(prompts, iteration, num_samples), policy_version, sampling, on_rollout, cancelled)

    def answer(
        self,
        requests: list[PendingRequest],
        policy_version: int,
        sampling: Sampling,
        on_rollout: Callable[[Rollout], None],
        cancelled: Callable[[], bool],
    ) -> list[Rollout]:
        """The responses to these requests, whose keys differ, in their order.

        Only engines that hold policy_version are asked. Raises RolloutError if none did for
        rollout.all_dead_timeout_s, if a request is refused, or, within a second, once ``cancelled`` returns true (the
        engines then drop the requests); ValueError if a prompt leaves no room for a response.
        """
        return asyncio.run(self.generate_async(requests, policy_version, sampling, on_rollout, cancelled))

    async def generate_async(
        self,
        requests: list[PendingRequest],
        policy_version: int,
        sampling: Sampling,
        on_rollout: Callable[[Rollout], None],
        cancelled: Callable[[], bool],
    ) -> list[Rollout]:
        """See answer."""
        rollouts: dict[int, Rollout] = {}

        def take(key: int, rollout: Rollout) -> None:
            rollouts[key] = rollout
            on_rollout(rollout)

        async with engine_http.open_session(read_secret(self.rendezvous / SECRET)) as session:
            fleet = Fleet(self.rendezvous, session, policy_version, self.config.health_timeout_s)
            progress = Progress("rollouts", len(requests), unit="tok") if self.show_progress else None
            generation = Generation(
                self.config, self.decode, self.tools, session, fleet, sampling, take, cancelled, progress
            )
            generation.add(requests)
            await generation.run()
        return [rollouts[item.request.key] for item in requests]

    def stream(self, policy_version: int, sampling: Sampling) -> "RolloutStream":
        """Generation without an end, to which requests are added while weights are pushed."""
        return RolloutStream(self, policy_version, sampling)

    def plan(self, prompts: Sequence[Prompt], iteration: int, num_samples: int) -> list[PendingRequest]:
        """The requests of an iteration; the same prompts always give the same seeds."""
        requests: list[PendingRequest] = []
        for prompt in prompts:
            room = self.room(prompt)
            for sample in range(num_samples):
                seed = sample_seed(self.run_seed, iteration, prompt.prompt_id, sample)
                request = GenerateRequest(len(requests), list(prompt.token_ids), room, seed)
                turns = None
                if self.tools is not None and (stop := self.tools.stops.get(prompt.task)) is not None:
                    turns = Turns(request, stop, self.tools.max_calls)
                    request = turns.request()
                requests.append(PendingRequest(prompt, sample, request, turns=turns))
        return requests

    def plan_window(
        self, key: int, prompt: Prompt, sample: int, iteration: int, so_far: Rollout | None, num_tokens: int
    ) -> PendingRequest:
        """The request for the next ``num_tokens`` of a response that began in ``iteration``; its prompt is all before.

        so_far: what there is of it; None: it begins.
        """
        so_far_ids = () if so_far is None else so_far.response_ids
        # No room is left of a response only if rollout.max_tokens was lowered since: then it gets its last token.
        room = max(1, self.room(prompt) - len(so_far_ids))
        first_seed = sample_seed(self.run_seed, iteration, prompt.prompt_id, sample)
        request = GenerateRequest(
            key,
            [*prompt.token_ids, *so_far_ids],
            min(num_tokens, room),
            turn_seed(first_seed, len(so_far_ids)),
            num_routed=len(prompt.token_ids) + len(so_far_ids) - 1 if so_far and so_far.routed_experts else 0,
        )
        return PendingRequest(prompt, sample, request, so_far=so_far, rest=room - request.max_tokens)

    def room(self, prompt: Prompt) -> int:
        """Tokens that the response to a prompt may have. Raises ValueError if there is no room for any."""
        room = min(self.config.max_tokens, self.max_length - len(prompt.token_ids))
        if room < 1:
            raise ValueError(
                f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens; model.max_length = "
                f"{self.max_length} leaves no room for a response"
            )
        return room


class RolloutStream:
    """Requests that are added at any time, answered by engines that take new weights meanwhile; runs in a thread.

    A request goes to an engine that holds ``policy_version``, which follows the pushes, and stays there through later
    ones. Methods and attributes are for other threads than the stream's.
    """

    def __init__(self, client: RolloutClient, policy_version: int, sampling: Sampling) -> None:
        self.client, self.sampling = client, sampling
        self.policy_version = policy_version
        self.held = False
        """Whether engines get no further requests."""
        self.num_running = 0
        """Requests that engines have."""
        self.keys = itertools.count()
        self.added: queue.SimpleQueue[tuple[PendingRequest, Callable[[Rollout], None]]] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.failure: BaseException | None = None
        """What ended the stream."""
        threading.Thread(target=self._run, name="generate", daemon=True).start()

    def add(self, request: PendingRequest, on_rollout: Callable[[Rollout], None]) -> None:
        """Have it answered. on_rollout: is called with the response, in the stream's thread, and returns at once."""
        key = next(self.keys)
        request.request = msgspec.structs.replace(request.request, key=key)
        if request.turns is not None:
            request.turns.first = msgspec.structs.replace(request.turns.first, key=key)
        self.added.put((request, on_rollout))

    def close(self) -> None:
        """Engines drop what is not answered."""
        self.closed.set()

    def _run(self) -> None:
        try:
            asyncio.run(self._generate())
        except BaseException as error:
            self.failure = error

    async def _generate(self) -> None:
        client = self.client
        answers: dict[int, Callable[[Rollout], None]] = {}
        async with engine_http.open_session(read_secret(client.rendezvous / SECRET)) as session:
            fleet = Fleet(
                client.rendezvous, session, self.policy_version, client.config.health_timeout_s, across_pushes=True
            )
            generation = Generation(
                client.config,
                client.decode,
                client.tools,
                session,
                fleet,
                self.sampling,
                lambda key, rollout: answers.pop(key)(rollout),
            )

            async def follow() -> None:
                while not self.closed.is_set():
                    if fleet.policy_version != self.policy_version:
                        fleet.policy_version = self.policy_version
                        fleet.look_now.set()
                    while not self.added.empty():
                        request, on_rollout = self.added.get()
                        answers[request.request.key] = on_rollout
                        generation.add([request])
                    if generation.held and not self.held:
                        fleet.changed.set()
                    generation.held, self.num_running = self.held, generation.num_running
                    await asyncio.sleep(FOLLOW_S)

            following = asyncio.create_task(follow())
            following.add_done_callback(lambda _: fleet.changed.set())
            try:
                await generation.run(until=following.done)
                following.result()
            finally:
                following.cancel()
