"""A batch of rollouts as arrays: some numbers per rollout on every rank, the tokens only where they are worked on.

Per-token quantities are flat: the response tokens of a replica's rollouts, one after the other, float32 [N].
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_vcppo.records import Rollout, RolloutPart, TrainSequence
from megatron_vcppo.rewards.verifier import Verdict

ROW = np.dtype(
    [
        ("place", "<i8"),
        ("group", "<u8"),
        ("digest", "<u8"),
        ("prompt_length", "<i4"),
        ("response_length", "<i4"),
        ("observed_length", "<i4"),
        ("trained_length", "<i4"),
        ("reward", "<f4"),
        ("model_score", "<f8"),
        ("truncated", "?"),
        ("unfinished", "?"),
        ("is_correct", "?"),
        ("verdict", "<i2"),
    ]
)
"""What every rank knows of a rollout. observed_length: tokens of the response that a tool wrote. trained_length: its
first tokens, which iterations before trained the actor on. group: equal for samples of one prompt. digest: of all that
its training reads. verdict: an index into ``VERDICTS``. model_score: of a reward model, NaN without one. unfinished: it
is continued in the next iteration; its reward here is 0."""
VERDICTS = ("", "timeout", "error")
"""Kinds of verdicts that are counted."""
BLOCK_TOKENS = 1 << 17
"""Padded tokens that are worked on at a time, which bounds temporary memory."""


def rows_of(part: RolloutPart) -> np.ndarray:
    """ROW [n] of rollouts, scored if they are finished, in their order."""
    rows = np.zeros(len(part), ROW)
    for row, (place, rollout) in zip(rows, part.items(), strict=True):
        prompt = rollout.prompt
        assert rollout.reward is not None or rollout.unfinished, f"rollout of {prompt.prompt_id} was not scored"
        assert len(rollout.response_ids), f"rollout of {prompt.prompt_id} is empty"
        digest = xxhash.xxh3_64(repr((prompt.prompt_id, rollout.sample_index, rollout.seed, rollout.reward)).encode())
        if rollout.model_score is not None:
            digest.update(repr(rollout.model_score).encode())
        digest.update(np.asarray(rollout.rollout_logprobs, dtype=np.float32).tobytes())
        digest.update(np.asarray(rollout.response_ids, dtype=np.int32).tobytes())
        digest.update(rollout.routed_experts)
        if rollout.observations:
            digest.update(repr(rollout.observations).encode())
        if rollout.num_trained:
            digest.update(repr(rollout.num_trained).encode())
        kind = Verdict(0.0, rollout.verdict).kind
        row["place"], row["group"], row["digest"] = (
            place,
            xxhash.xxh3_64_intdigest(prompt.prompt_id.encode()),
            digest.intdigest(),
        )
        row["prompt_length"], row["response_length"] = len(prompt.token_ids), len(rollout.response_ids)
        row["observed_length"] = rollout.num_observed
        assert row["observed_length"] < row["response_length"], f"rollout of {prompt.prompt_id} is a tool's alone"
        row["trained_length"], row["unfinished"] = rollout.num_trained, rollout.unfinished
        assert rollout.num_trained < len(rollout.response_ids), f"rollout of {prompt.prompt_id} has no new token"
        row["reward"], row["truncated"] = 0.0 if rollout.reward is None else rollout.reward, rollout.truncated
        row["is_correct"] = rollout.is_correct
        row["model_score"] = math.nan if rollout.model_score is None else rollout.model_score
        row["verdict"] = VERDICTS.index(kind) if kind in VERDICTS else 0
    return rows


def tokens_of(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts and responses, int32, and log-probs, float32 [N], each one rollout after the other."""
    ids = [np.asarray(part, np.int32) for r in rollouts for part in (r.prompt.token_ids, r.response_ids)]
    logprobs = [np.asarray(r.rollout_logprobs, np.float32) for r in rollouts]
    return (
        torch.from_numpy(np.concatenate(ids or [np.zeros(0, np.int32)])),
        torch.from_numpy(np.concatenate(logprobs or [np.zeros(0, np.float32)])),
    )


@dataclass(frozen=True)
class ExpertsFormat:
    """How the experts that an engine chose for a token are stored."""

    num_layers: int
    """Dense ones included, for which engines send anything."""
    per_token: int
    num_bytes: int
    """Of each expert's number: 1 or 2."""

    @property
    def row_bytes(self) -> int:
        """Of a token."""
        return self.num_layers * self.per_token * self.num_bytes

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """[n, layers, experts per token] of uint8 [n, row_bytes]; no copy."""
        kind = np.uint8 if self.num_bytes == 1 else np.int16
        return rows.view(kind).reshape(len(rows), self.num_layers, self.per_token)


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that engines chose for the tokens of some rollouts."""

    rows: Tensor
    """uint8 [tokens of prompts and responses, row_bytes]"""
    format: ExpertsFormat

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], form: ExpertsFormat) -> "RoutedExperts":
        """One rollout after the other. At its end tokens without experts, whose outputs nothing reads, get any."""
        lengths = [len(rollout.prompt.token_ids) + len(rollout.response_ids) for rollout in rollouts]
        rows = np.empty((sum(lengths), form.row_bytes), np.uint8)
        form.numbers(rows)[:] = np.arange(form.per_token)
        start = 0
        for rollout, length in zip(rollouts, lengths, strict=True):
            known = np.frombuffer(rollout.routed_experts, np.uint8).reshape(-1, form.row_bytes)
            assert 0 < len(known) < length, f"{rollout.prompt.prompt_id}: experts of {len(known)} of {length} tokens"
            rows[start : start + len(known)] = known
            start += length
        return cls(torch.from_numpy(rows), form)


def sampled_tokens(rollouts: Sequence[Rollout]) -> Tensor:
    """bool [N], response tokens, one rollout after the other: True where the policy sampled the token."""
    sampled = np.ones(sum(len(rollout.response_ids) for rollout in rollouts), dtype=bool)
    first = 0
    for rollout in rollouts:
        for start, end in rollout.observations:
            sampled[first + start : first + end] = False
        first += len(rollout.response_ids)
    return torch.from_numpy(sampled)


@dataclass(frozen=True)
class RolloutTable:
    """Numbers of B rollouts, in their order. Of a whole batch it is the same on every rank."""

    rows: np.ndarray
    """ROW [B]"""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> "RolloutTable":
        """Some of them."""
        return RolloutTable(self.rows[np.asarray(indices, dtype=np.int64)])

    @property
    def lengths(self) -> Tensor:
        """Response tokens, those of tools included: int64 [B]."""
        return torch.from_numpy(self.rows["response_length"].astype(np.int64))

    @property
    def sampled_lengths(self) -> Tensor:
        """Response tokens that the policy sampled: int64 [B]."""
        return self.lengths - torch.from_numpy(self.rows["observed_length"].astype(np.int64))

    @property
    def new_lengths(self) -> Tensor:
        """Those of them that no iteration before has trained the actor on: int64 [B]. Tools and windows exclude each
        other."""
        return self.sampled_lengths - torch.from_numpy(self.rows["trained_length"].astype(np.int64))

    @property
    def unfinished(self) -> Tensor:
        """bool [B]: continued in the next iteration, and without a reward."""
        return torch.from_numpy(self.rows["unfinished"].copy())

    @property
    def has_windows(self) -> bool:
        """Whether any response is not whole, or was not in an iteration before."""
        return bool(self.rows["unfinished"].any() or self.rows["trained_length"].any())

    @property
    def has_observations(self) -> bool:
        """Whether a tool wrote any token."""
        return bool(self.rows["observed_length"].any())

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of prompt and response: int64 [B]."""
        return self.rows["prompt_length"].astype(np.int64) + self.rows["response_length"]

    @property
    def rewards(self) -> Tensor:
        """float32 [B]"""
        return torch.from_numpy(self.rows["reward"].copy())

    @property
    def model_scores(self) -> Tensor:
        """float64 [B]: of the reward model."""
        return torch.from_numpy(self.rows["model_score"].copy())

    def with_rewards(self, rewards: Tensor) -> "RolloutTable":
        """The same rollouts with other rewards [B]."""
        rows = self.rows.copy()
        rows["reward"] = rewards.numpy()
        return RolloutTable(rows)

    @property
    def truncated(self) -> Tensor:
        """bool [B]: stopped by the token limit."""
        return torch.from_numpy(self.rows["truncated"].copy())

    @property
    def is_correct(self) -> Tensor:
        """bool [B]: whether the verifier accepted the response."""
        return torch.from_numpy(self.rows["is_correct"].copy())

    @property
    def group_ids(self) -> Tensor:
        """int64 [B], from 0: equal for samples of one prompt."""
        return torch.from_numpy(np.unique(self.rows["group"], return_inverse=True)[1].astype(np.int64))

    def num_verdicts(self, kind: str) -> int:
        """How many verdicts are of this kind of ``VERDICTS``."""
        return int((self.rows["verdict"] == VERDICTS.index(kind)).sum())


@dataclass(frozen=True)
class Block:
    """Some consecutive rollouts of a share, padded to the longest: b of them, t tokens."""

    rows: slice
    """Of the share's rollouts."""
    tokens: slice
    """Of its flat response tokens."""
    mask: Tensor
    """bool [b, t]: response tokens."""
    sampled: Tensor
    """bool [b, t]: those of them that the policy sampled."""

    def pad(self, flat: Tensor) -> Tensor:
        """[b, t] of the share's flat [N], 0 beyond the responses."""
        padded = torch.zeros(self.mask.shape, dtype=flat.dtype)
        padded[self.mask] = flat[self.tokens]
        return padded


@dataclass(frozen=True)
class RolloutShare:
    """The rollouts of a batch that one replica works on; the same on all its ranks.

    Example: with two replicas, responses (7, 8, 2), (9, 2) and (5, 5), the first replica has ``rows`` (0,), ``lengths``
    (3,), and N = 3 response tokens.
    """

    batch: RolloutTable
    """Of all replicas."""
    replicas: np.ndarray
    """int64 [B]: which replica has each rollout of the batch."""
    rows: np.ndarray
    """int64 [n]: the rollouts of the batch that are here, rising."""
    token_ids: Tensor
    """int32: prompt and response of each rollout, one after the other."""
    rollout_logprobs: Tensor
    """float32 [N], from the engines; empty in a part of a minibatch whose losses do not read them."""
    sampled: Tensor
    """bool [N]: tokens that the policy sampled; all others are a tool's."""
    routed_experts: RoutedExperts | None = None
    """With routing replay, of the tokens in ``token_ids``."""

    @classmethod
    def whole(cls, rollouts: Sequence[Rollout]) -> "RolloutShare":
        """A batch that is all on one replica."""
        token_ids, logprobs = tokens_of(rollouts)
        count = len(rollouts)
        table = RolloutTable(rows_of(RolloutPart.whole(rollouts)))
        sampled = sampled_tokens(rollouts)
        return cls(table, np.zeros(count, np.int64), np.arange(count), token_ids, logprobs, sampled)

    @cached_property
    def table(self) -> RolloutTable:
        """Of the rollouts that are here."""
        return self.batch.take(self.rows)

    @property
    def num_tokens(self) -> int:
        """N, response tokens."""
        return int(self.table.lengths.sum())

    @property
    def response_ids(self) -> Tensor:
        """int32 [N]"""
        own = self.table.rows
        spans = np.stack((own["prompt_length"], own["response_length"]), axis=1).ravel()
        return torch.from_numpy(self.token_ids.numpy()[np.repeat(np.arange(len(spans)) % 2 == 1, spans)])

    @cached_property
    def is_new(self) -> Tensor:
        """bool [N]: tokens that no iteration before has trained the actor on."""
        old = torch.from_numpy(self.table.rows["trained_length"].astype(np.int64))
        spans = torch.stack((old, self.table.lengths - old), dim=1).ravel()
        return torch.tensor([False, True]).repeat(len(old)).repeat_interleave(spans)

    def per_token(self, per_rollout: Tensor) -> Tensor:
        """[N]: each response token gets its rollout's number. per_rollout: [n]."""
        return per_rollout.repeat_interleave(self.table.lengths)

    def blocks(self, num_tokens: int = BLOCK_TOKENS) -> Iterator[Block]:
        """All rollouts in blocks of at most ``num_tokens`` padded tokens; at least one block, which may be empty."""
        lengths = self.table.lengths
        ends = [0, *lengths.cumsum(0).tolist()]
        first = 0
        while first < len(lengths) or first == 0:
            last, longest = first, 0
            while last < len(lengths):
                longest = max(longest, int(lengths[last]))
                if last > first and longest * (last + 1 - first) > num_tokens:
                    break
                last += 1
            mine = lengths[first:last]
            mask = torch.arange(int(mine.max()) if len(mine) else 1) < mine[:, None]
            tokens = slice(ends[first], ends[last])
            sampled = torch.zeros_like(mask)
            sampled[mask] = self.sampled[tokens]
            yield Block(slice(first, last), tokens, mask, sampled)
            if last == len(lengths):
                return
            first = last

    def sequences(
        self, fields: Mapping[str, Tensor], order: Sequence[int] | None = None, *, with_experts: bool = False
    ) -> list[TrainSequence]:
        """Prompt and response of each rollout; ``fields`` [N] become per-token fields, 0 on the prompt.

        order: indices of this share's rollouts; default: all as they are. with_experts: with the experts that engines
        chose, if they are known.
        """
        routed = self.routed_experts if with_experts else None
        own = self.table.rows
        arrays = {name: tensor.numpy() for name, tensor in fields.items()}
        ends, response_ends = self.table.sequence_lengths.cumsum(), own["response_length"].astype(np.int64).cumsum()
        ids = self.token_ids.numpy()
        result = []
        for index in range(len(own)) if order is None else order:
            num_prompt, num_response = int(own["prompt_length"][index]), int(own["response_length"][index])
            padded = {}
            for name, array in arrays.items():
                padded[name] = np.zeros(num_prompt + num_response, dtype=array.dtype)
                padded[name][num_prompt:] = array[response_ends[index] - num_response : response_ends[index]]
            tokens = slice(ends[index] - num_prompt - num_response, ends[index])
            experts = None if routed is None else routed.format.numbers(routed.rows.numpy()[tokens])
            result.append(TrainSequence(ids[tokens], padded, experts))
        return result

    def flatten(self, rows: Iterable[tuple[int, Tensor]]) -> Tensor:
        """float32 [N] from (index, model outputs of its whole sequence), of every rollout (``packing.unpack_each``)."""
        lengths = self.table.lengths.tolist()
        ends = self.table.lengths.cumsum(0).tolist()
        flat = torch.zeros(self.num_tokens)
        for index, row in rows:
            flat[ends[index] - lengths[index] : ends[index]] = row[len(row) - lengths[index] :]
        return flat


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of the models for a share before its update; all float32 [N]."""

    old_logprobs: Tensor | None
    """Of the actor; None if its loss reads those of the engines."""
    rollout_logprobs: Tensor
    """From the engines."""
    ref_logprobs: Tensor | None = None
    """Of the frozen reference; None without KL terms."""
    values: Tensor | None = None
    """Of the critic; None with a group baseline."""

    @property
    def policy_logprobs(self) -> Tensor:
        """Of the policy before the update, as the actor or else the engines compute them."""
        return self.rollout_logprobs if self.old_logprobs is None else self.old_logprobs

    def by_name(self) -> dict[str, Tensor]:
        """Those that there are, under the names of the fields that losses read."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def field_types(tensors: Mapping[str, Tensor]) -> dict[str, type]:
    """bool or float of each field, as ``Packer.pack`` wants to know it of a shard without rollouts."""
    return {name: bool if tensor.dtype == torch.bool else float for name, tensor in tensors.items()}
