"""Rollouts as tensors [B, T] over response tokens for the algorithm, and as whole sequences for the models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vcppo.records import Rollout, TrainSequence


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts, responses left-aligned and padded to the longest, T tokens. The same on every rank.

    Example: responses (7, 8, 2) and (9, 2) give response_mask [[1, 1, 1], [1, 1, 0]].
    """

    rollouts: tuple[Rollout, ...]
    response_mask: Tensor
    """bool [B, T]"""
    rollout_logprobs: Tensor
    """float32 [B, T], from the engines"""
    rewards: Tensor
    """float32 [B]"""
    truncated: Tensor
    """bool [B]: stopped by the token limit"""
    group_ids: Tensor
    """int64 [B]: equal for samples of one prompt"""

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def lengths(self) -> Tensor:
        """Response tokens: int64 [B]."""
        return self.response_mask.sum(dim=1)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of prompt and response of each rollout."""
        return [len(r.prompt.token_ids) + len(r.response_ids) for r in self.rollouts]

    @property
    def is_correct(self) -> Tensor:
        """bool [B]: whether the verifier accepted the response."""
        return torch.tensor([rollout.is_correct for rollout in self.rollouts])

    def to_rows(self, rows: Sequence[Sequence[float]], indices: Sequence[int]) -> Tensor:
        """Model outputs per whole sequence (see ``PackedMicrobatch.unpack``) as float32 [B, T]; other rows are 0."""
        out = torch.zeros(self.response_mask.shape)
        for row, index in zip(rows, indices, strict=True):
            num_prompt = len(self.rollouts[index].prompt.token_ids)
            response = torch.tensor(row[num_prompt:])
            out[index, : len(response)] = response
        return out

    def sequences(self, indices: Sequence[int], fields: Mapping[str, Tensor]) -> list[TrainSequence]:
        """Prompt + response of the chosen rollouts; ``fields`` [B, T] become per-token fields, 0 on the prompt."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in fields.items()}
        result = []
        for index in indices:
            rollout = self.rollouts[index]
            num_prompt, num_response = len(rollout.prompt.token_ids), len(rollout.response_ids)
            padded = {}
            for name, array in arrays.items():
                padded[name] = np.zeros(num_prompt + num_response, dtype=array.dtype)
                padded[name][num_prompt:] = array[index, :num_response]
            result.append(TrainSequence((*rollout.prompt.token_ids, *rollout.response_ids), padded))
        return result


def make_batch(rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Tensors of scored rollouts; the order of the rollouts is kept."""
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    mask = torch.zeros(len(rollouts), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(rollouts), longest)
    groups: dict[str, int] = {}
    for i, rollout in enumerate(rollouts):
        assert rollout.reward is not None, f"rollout of {rollout.prompt.prompt_id} was not scored"
        assert rollout.response_ids, f"rollout of {rollout.prompt.prompt_id} is empty"
        mask[i, : len(rollout.response_ids)] = True
        logprobs[i, : len(rollout.response_ids)] = torch.tensor(rollout.rollout_logprobs)
        groups.setdefault(rollout.prompt.prompt_id, len(groups))
    return RolloutBatch(
        rollouts=tuple(rollouts),
        response_mask=mask,
        rollout_logprobs=logprobs,
        rewards=torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32),
        truncated=torch.tensor([rollout.truncated for rollout in rollouts]),
        group_ids=torch.tensor([groups[rollout.prompt.prompt_id] for rollout in rollouts]),
    )


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of the models for a batch before its update; all float32 [B, T], 0 beyond the responses."""

    old_logprobs: Tensor
    """Of the actor."""
    rollout_logprobs: Tensor
    """From the engines."""
    ref_logprobs: Tensor | None = None
    """Of the frozen reference; None without KL terms."""
    values: Tensor | None = None
    """Of the critic; None with a group baseline."""

    def by_name(self) -> dict[str, Tensor]:
        """Those that there are, [B, T], under the names of the fields that losses read."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def field_types(tensors: Mapping[str, Tensor]) -> dict[str, type]:
    """bool or float of each field, as ``Packer.pack`` wants to know it of a shard without rollouts."""
    return {name: bool if tensor.dtype == torch.bool else float for name, tensor in tensors.items()}
