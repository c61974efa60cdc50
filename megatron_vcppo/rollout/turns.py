"""A response in several turns: what the policy wrote and what its tool wrote, until the next request."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_vcppo.data.seeds import turn_seed
from megatron_vcppo.records import Prompt
from megatron_vcppo.rollout.messages import GenerateRequest, Response


@dataclass(frozen=True)
class ToolCalls:
    """How a client calls tools."""

    stops: Mapping[str, str]
    """By task: the text behind which generation pauses; tasks without a tool are not in it."""
    call: Callable[[Prompt, str], Future[str]]
    """(prompt, text of the response so far) → what the tool writes."""
    encode: Callable[[str], Sequence[int]]
    max_calls: int
    """Per response; later ones are not answered: generation does not pause for them."""


@dataclass
class Turns:
    """The turns of one response so far."""

    first: GenerateRequest
    """As it was planned: all turns together have its max_tokens."""
    stop: str
    max_calls: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    observations: list[tuple[int, int]] = field(default_factory=list)
    num_calls: int = 0
    policy_version: int | None = None
    """Of the first token."""
    version_changes: list[tuple[int, int]] = field(default_factory=list)
    """(token, policy version), as in a response: turns may be sampled under different weights."""
    routed_experts: bytearray = field(default_factory=bytearray)
    """If requested, of the first ``num_routed`` tokens of prompt and response."""
    num_routed: int = 0

    def request(self) -> GenerateRequest:
        """The next turn."""
        return GenerateRequest(
            key=self.first.key,
            token_ids=[*self.first.token_ids, *self.token_ids],
            max_tokens=self.room,
            seed=turn_seed(self.first.seed, self.num_calls),
            stop=[self.stop] if self.num_calls < self.max_calls else [],
            num_routed=self.num_routed,
        )

    @property
    def room(self) -> int:
        """Tokens that may follow."""
        return self.first.max_tokens - len(self.token_ids)

    @property
    def last_version(self) -> int | None:
        """Of the last token that was sampled."""
        return self.version_changes[-1][1] if self.version_changes else self.policy_version

    def add_turn(self, response: Response, text: str) -> bool:
        """What an engine wrote, and its text; True if it ended with a call that is to be answered."""
        start = len(self.token_ids)
        if self.policy_version is None:
            self.policy_version = response.policy_version
        elif response.policy_version != self.last_version:
            self.version_changes.append((start, response.policy_version))
        self.version_changes += [(start + token, version) for token, version in response.version_changes]
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        if response.routed_experts:
            self.routed_experts += response.routed_experts
            self.num_routed = len(self.first.token_ids) + len(self.token_ids) - 1
        return response.finish_reason == "stop" and self.num_calls < self.max_calls and self.stop in text

    def add_observation(self, token_ids: Sequence[int]) -> bool:
        """What the tool wrote, as far as there is room; True if there is room for a further turn."""
        self.num_calls += 1
        taken = list(token_ids[: self.room])
        if taken:
            start = len(self.token_ids)
            self.observations.append((start, start + len(taken)))
            self.token_ids += taken
            self.logprobs += [0.0] * len(taken)
        return self.room > 0

    def response(self, finish_reason: str) -> Response:
        """All turns as one."""
        assert self.policy_version is not None
        return Response(
            self.first.key,
            self.token_ids,
            self.logprobs,
            finish_reason,
            self.policy_version,
            version_changes=self.version_changes,
            routed_experts=bytes(self.routed_experts),
        )
