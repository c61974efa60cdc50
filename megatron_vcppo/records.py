"""Frozen records that travel between phases: what a prompt, a rollout and a training sequence are.

No torch, no numpy: configuration and command line load them on a login node.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sent to an engine.

    Example: ``Prompt("chain/17", (1, 12, 40), "3 +4 ?", "7", "running_sum")``.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str
    task: str


@dataclass(frozen=True)
class Rollout:
    """One prompt with one sampled response, as it came back from an engine, and its reward once scored."""

    prompt: Prompt
    sample_index: int
    """Which of the n samples of this prompt, from 0."""
    seed: int
    """The sampling seed, derived from (run seed, iteration, prompt id, sample index)."""
    response_ids: Sequence[int]
    """Kept as an ``array`` of 4 bytes per token, whatever is given."""
    response_text: str
    rollout_logprobs: Sequence[float]
    """log p(token) under the engine's policy and sampling temperature, one per response token; kept as an ``array`` of
    float32."""
    finish_reason: str
    """"stop" (an end token was sampled), "length" (truncated at max_tokens) or "window" (unfinished: the next iteration
    continues it)."""
    policy_version: int
    """Of the weights under which the first token was sampled."""
    reward: float | None = None
    verdict: str = ""
    """Why the reward is what it is: "correct", "wrong", "no answer", "timeout", "error: …"."""
    model_score: float | None = None
    """What the reward model gave, before normalization; None without one. ``reward`` is the verifier's alone."""
    observations: Sequence[tuple[int, int]] = ()
    """Spans [start, end) of ``response_ids``, rising, that a tool wrote and the policy did not sample. Nothing is
    learned on them; their ``rollout_logprobs`` are 0. Kept as a tuple of tuples."""
    version_changes: Sequence[tuple[int, int]] = ()
    """(token, policy version), rising: from this token on the response was sampled under other weights, because a push
    came meanwhile. Kept as a tuple of tuples."""
    routed_experts: bytes = b""
    """With routing replay: the experts that the engine chose, token by token of prompt and response and layer by layer,
    1 byte each, or 2 (little-endian) where a layer has more than 256. The last token, which no engine runs, has none;
    tokens of a tool at the end of the response have none either."""
    num_trained: int = 0
    """Response tokens, the first ones, that iterations before have trained the actor on (``ppo.window_tokens``)."""

    def __post_init__(self) -> None:
        for name, kind in (("response_ids", "i"), ("rollout_logprobs", "f")):
            value = getattr(self, name)
            if not isinstance(value, array):
                object.__setattr__(self, name, array(kind, value))
        for name in ("observations", "version_changes"):
            object.__setattr__(self, name, tuple((first, second) for first, second in getattr(self, name)))

    @property
    def num_observed(self) -> int:
        """Response tokens that a tool wrote."""
        return self._observed(0, len(self.response_ids))

    def _observed(self, start: int, end: int) -> int:
        """Of the response tokens [start, end), those that a tool wrote."""
        return sum(max(0, min(end, last) - max(start, first)) for first, last in self.observations)

    def versions(self) -> Iterator[tuple[int, int]]:
        """(policy version, number of tokens sampled under it), in the order of the tokens, without ``num_trained``."""
        starts = (0, *(token for token, _ in self.version_changes), len(self.response_ids))
        versions = (self.policy_version, *(version for _, version in self.version_changes))
        for version, (start, end) in zip(versions, pairwise(starts), strict=True):
            if end > self.num_trained:
                start = max(start, self.num_trained)
                yield version, end - start - self._observed(start, end)

    @property
    def truncated(self) -> bool:
        """True if the response reached the token limit: its last token does not end the episode."""
        return self.finish_reason == "length"

    @property
    def unfinished(self) -> bool:
        """True if the response is continued in the next iteration: it has no reward yet."""
        return self.finish_reason == "window"

    def continued(self, later: "Rollout") -> "Rollout":
        """An unfinished response with what was sampled next, under ``later``'s weights; its tokens count as trained on.

        later: of the same sample; its tokens, log-probs, versions and experts are those of the continuation alone.
        """
        start, before = len(self.response_ids), [self.policy_version, *(version for _, version in self.version_changes)]
        changes = [(start, later.policy_version)] if later.policy_version != before[-1] else []
        changes += [(start + token, version) for token, version in later.version_changes]
        return replace(
            later,
            seed=self.seed,
            response_ids=array("i", [*self.response_ids, *later.response_ids]),
            rollout_logprobs=array("f", [*self.rollout_logprobs, *later.rollout_logprobs]),
            policy_version=self.policy_version,
            version_changes=(*self.version_changes, *changes),
            # Of a continuation without routing replay nothing is known, and a part of them would be taken for all.
            routed_experts=self.routed_experts + later.routed_experts if later.routed_experts else b"",
            num_trained=start,
        )

    def continues(self, before: "Rollout | None") -> bool:
        """Whether this is ``before``, an unfinished response, with more tokens; None: whether nothing was before it."""
        num_tokens = 0 if before is None else len(before.response_ids)
        begins_so = before is None or self.response_ids[:num_tokens] == before.response_ids
        return self.num_trained == num_tokens and begins_so

    @property
    def is_correct(self) -> bool:
        """True if the verifier accepted the response; False also before it was scored."""
        return self.reward is not None and self.reward > 0


@dataclass(frozen=True)
class RolloutPart:
    """The rollouts of a batch that one process has, and their places in the order of the batch, which rise.

    Places are unique within the batch and need not follow each other.
    """

    places: Sequence[int] = ()
    rollouts: Sequence[Rollout] = ()

    def __len__(self) -> int:
        return len(self.rollouts)

    @classmethod
    def whole(cls, rollouts: Sequence[Rollout]) -> "RolloutPart":
        """A whole batch in its order."""
        return cls(range(len(rollouts)), rollouts)

    @classmethod
    def of(cls, placed: Iterable[tuple[int, Rollout]]) -> "RolloutPart":
        """From (place, rollout), in any order."""
        ordered = sorted(placed, key=lambda item: item[0])
        return cls([place for place, _ in ordered], [rollout for _, rollout in ordered])

    def items(self) -> Iterator[tuple[int, Rollout]]:
        """(place, rollout), by place."""
        return zip(self.places, self.rollouts, strict=True)


@dataclass(frozen=True)
class TrainSequence:
    """One training sequence before packing: token ids and per-token fields of the same length.

    ``fields`` maps a name to one number per token ("loss_mask", "advantages", …), a tuple or an array; position t
    belongs to the token at t. What is predicted (log-probs) or regressed (values) for token t comes from the model's
    output at position t - 1; packing shifts, callers never do. token_ids: a tuple or an array.
    """

    token_ids: Any
    fields: dict[str, Any] = field(default_factory=dict)
    routed_experts: Any = None
    """[tokens or tokens - 1, layers, K] array of the experts that the engine chose for each token; what it has for the
    last one is not read. All sequences that are packed together have them, or none has."""

    def __len__(self) -> int:
        return len(self.token_ids)
