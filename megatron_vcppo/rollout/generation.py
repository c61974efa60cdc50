"""Requests of which each is in exactly one place: waiting, with one engine, or (between two turns) with its tool.

A request leaves by its response, which is counted once; if its engine fails, it waits again. Seeds are fixed per
request, so a response drawn twice is the same response.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import aiohttp

from megatron_vcppo.config import RolloutConfig
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout import engine_http
from megatron_vcppo.rollout.fleet import Fleet, Member
from megatron_vcppo.rollout.messages import GenerateBatch, GenerateRequest, Response, Sampling
from megatron_vcppo.rollout.turns import ToolCalls, Turns
from megatron_vcppo.run.progress import Progress

log = logging.getLogger(__name__)

RequestId = tuple[str, int, int]
"""(prompt id, sample index, seed)"""
MAX_ERRORS = 3
"""A request that engines refuse this often ends generation: it is the request's fault, not theirs."""
MAX_LOSSES = 6
"""A request whose engine failed this often ends generation: it may be what kills them."""


class RolloutError(RuntimeError):
    """Generation cannot continue: no engine, or a request that every engine refuses."""


@dataclass
class PendingRequest:
    """One response that is still to come."""

    prompt: Prompt
    sample_index: int
    request: GenerateRequest
    errors: list[str] = field(default_factory=list)
    num_losses: int = 0
    """How often its engine failed before it was answered."""
    turns: Turns | None = None
    """Of a response that can call a tool; ``request`` is then its next turn."""
    so_far: Rollout | None = None
    """The unfinished response that it continues."""
    rest: int = 0
    """Tokens that may follow those of the request, which is then one window of a response."""
    begun_under: int | None = None
    """The policy version when it was given to its engine, which may begin it later; None: it waits for its first."""

    @property
    def tokens(self) -> int:
        """The most tokens that it can cost."""
        return len(self.request.token_ids) + self.request.max_tokens

    @property
    def request_id(self) -> RequestId:
        """The same for every window of a response."""
        seed = self.so_far.seed if self.so_far is not None else self.request.seed
        return self.prompt.prompt_id, self.sample_index, seed

    def rollout(self, response: Response, decode: Callable[[Sequence[int]], str]) -> Rollout:
        """The rollout that an engine's response, of all turns, makes of it."""
        turns, is_window = self.turns, self.rest > 0 and response.finish_reason == "length"
        found = Rollout(
            prompt=self.prompt,
            sample_index=self.sample_index,
            seed=self.request.seed if turns is None else turns.first.seed,
            response_ids=response.token_ids,
            response_text="",
            rollout_logprobs=response.logprobs,
            finish_reason="window" if is_window else response.finish_reason,
            policy_version=response.policy_version,
            observations=() if turns is None else turns.observations,
            version_changes=response.version_changes,
            routed_experts=response.routed_experts,
        )
        if self.so_far is not None:
            found = self.so_far.continued(found)
        return replace(found, response_text=decode(found.response_ids))

    def begin_again(self) -> None:
        """Its engine did not answer: what stands of it are the turns before."""
        self.begun_under = None if self.turns is None else self.turns.policy_version


class Generation:
    """What waits, what is with whom, what is done."""

    def __init__(
        self,
        config: RolloutConfig,
        decode: Callable[[Sequence[int]], str],
        tools: ToolCalls | None,
        session: engine_http.Session,
        fleet: Fleet,
        sampling: Sampling,
        on_answer: Callable[[int, Rollout], None],
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> None:
        """on_answer: gets each request's key and response, once."""
        self.config, self.decode, self.tools, self.session, self.fleet = config, decode, tools, session, fleet
        self.sampling, self.on_answer, self.cancelled, self.progress = sampling, on_answer, cancelled, progress
        self.waiting: deque[PendingRequest] = deque()
        self.unanswered: set[int] = set()
        """Keys of requests."""
        self.num_answered = self.num_running = 0
        self.held = False
        """Whether what waits goes on waiting."""
        self.failure: BaseException | None = None
        self.tool_calls: set[asyncio.Task] = set()

    def add(self, requests: Sequence[PendingRequest]) -> None:
        """Have these answered, too."""
        if not self.unanswered:  # engines that were away while nothing was requested of them have time to come back
            self.fleet.last_usable = time.monotonic()
        self.waiting.extend(requests)
        self.unanswered.update(item.request.key for item in requests)
        self.fleet.changed.set()

    async def run(self, until: Callable[[], bool] | None = None) -> None:
        """Until ``until`` returns true, by default until every request is answered; raises what went wrong."""
        watch = asyncio.create_task(self.fleet.watch())
        try:
            while self.unanswered if until is None else not until():
                self.fleet.changed.clear()
                self.dispatch()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.fleet.changed.wait(), 1.0)
                self.check(watch)
                if self.progress is not None:
                    self.progress.wait(self.in_flight())
        finally:
            watch.cancel()
            for call in self.tool_calls:
                call.cancel()
            for member in self.fleet.members.values():
                member.take_out("generation is over")

    def in_flight(self) -> dict[str, int]:
        """What progress shows next to the finished responses: minutes may pass before the first one is."""
        running = sum(member.requests_in_flight for member in self.fleet.members.values())
        return {"running": running, "engines": len(self.fleet.usable)}

    def check(self, watch: asyncio.Task) -> None:
        """Raise what went wrong, or if no engine could be used for too long."""
        if self.failure is not None:
            raise self.failure
        if self.cancelled():
            raise RolloutError("cancelled")
        if watch.done():
            watch.result()
        dead_s = time.monotonic() - self.fleet.last_usable
        if self.unanswered and not self.fleet.usable and dead_s > self.config.all_dead_timeout_s:
            raise RolloutError(
                f"no engine with policy version {self.fleet.policy_version} for {dead_s:.0f} s "
                f"(rollout.all_dead_timeout_s = {self.config.all_dead_timeout_s:g}); "
                f"{len(self.unanswered)} of {len(self.unanswered) + self.num_answered} responses are missing. "
                f"{self.fleet.describe()}"
            )

    def dispatch(self) -> None:
        """Give what waits to the engines with the fewest tokens in flight, in one call per engine."""
        given: dict[int, tuple[Member, list[PendingRequest]]] = {}
        while self.waiting and not self.held:
            free = [m for m in self.fleet.usable if m.requests_in_flight < self.config.engine.max_num_seqs]
            if not free:
                break
            member = min(free, key=lambda m: m.tokens_in_flight)
            item = self.waiting.popleft()
            if item.begun_under is None:
                item.begun_under = self.fleet.policy_version
            self.num_running += 1
            member.requests_in_flight += 1
            member.tokens_in_flight += item.tokens
            given.setdefault(id(member), (member, []))[1].append(item)
        for member, items in given.values():
            call = asyncio.create_task(self.call(member, items))
            member.calls.add(call)
            call.add_done_callback(member.calls.discard)

    async def call(self, member: Member, items: list[PendingRequest]) -> None:
        """Have one engine answer some requests; those that it does not answer wait again."""
        left = {item.request.key: item for item in items}
        batch = GenerateBatch(self.sampling, [item.request for item in items])
        try:
            async for response in engine_http.generate(
                self.session, member.engine, batch, self.config.request_timeout_s
            ):
                item = left.pop(response.key)
                self.release(member, [item])
                self.take(item, response, member)
                self.fleet.changed.set()
            if left:
                raise aiohttp.ClientPayloadError(f"the answer lacked {len(left)} of {len(items)} responses")
        except engine_http.FAILURES as error:
            log.warning(
                "%s failed (%s: %s); %d requests go to other engines",
                member.engine,
                type(error).__name__,
                error,
                len(left),
            )
            member.take_out(f"{type(error).__name__}: {error}")
        except Exception as error:
            self.failure = error
        finally:
            self.release(member, left.values())
            for item in left.values():
                item.begin_again()
            self.check_losses(left.values(), member)
            self.waiting.extendleft(reversed(left.values()))
            self.fleet.changed.set()

    def check_losses(self, lost: Iterable[PendingRequest], member: Member) -> None:
        """End generation if a request was with too many engines that failed: it may be what fails them."""
        for item in lost:
            item.num_losses += 1
            if item.num_losses >= MAX_LOSSES:
                self.failure = RolloutError(
                    f"prompt {item.prompt.prompt_id} ({len(item.request.token_ids)} tokens) was with {MAX_LOSSES} "
                    f"engines that failed, last {member.engine}: {member.trouble}"
                )

    def take(self, item: PendingRequest, response: Response, member: Member) -> None:
        """Count a response; one that an engine refused waits again, or ends generation if it was refused too often."""
        if response.error:
            item.errors.append(f"{member.engine}: {response.error}")
            if len(item.errors) >= MAX_ERRORS:
                raise RolloutError(f"prompt {item.prompt.prompt_id} was refused: {'; '.join(item.errors)}")
            item.begin_again()
            self.waiting.append(item)
            return
        if item.turns is not None:
            if item.turns.add_turn(response, self.decode(response.token_ids)):
                call = asyncio.create_task(self.answer_call(item, item.turns))
                self.tool_calls.add(call)
                call.add_done_callback(self.tool_calls.discard)
                return
            response = item.turns.response(response.finish_reason)
        self.finish(item, response)

    async def answer_call(self, item: PendingRequest, turns: Turns) -> None:
        """Have the tool answer the call at the end of a response; then it waits for its next turn, if there is room."""
        tools = self.tools
        assert tools is not None
        try:
            text = self.decode(turns.token_ids)
            observation = await asyncio.wrap_future(tools.call(item.prompt, text))
            if turns.add_observation(tools.encode(observation) if observation else ()):
                item.request = turns.request()
                self.waiting.appendleft(item)
            else:
                self.finish(item, turns.response("length"))
        except Exception as error:
            self.failure = error
        self.fleet.changed.set()

    def finish(self, item: PendingRequest, response: Response) -> None:
        """A response, or its window, is whole."""
        rollout = item.rollout(response, self.decode)
        self.unanswered.remove(item.request.key)
        self.num_answered += 1
        if self.progress is not None:
            self.progress.update(self.num_answered, len(response.token_ids), self.in_flight())
        self.on_answer(item.request.key, rollout)

    def release(self, member: Member, items: Iterable[PendingRequest]) -> None:
        """These requests are no longer with the engine."""
        for item in items:
            self.num_running -= 1
            member.requests_in_flight -= 1
            member.tokens_in_flight -= item.tokens
