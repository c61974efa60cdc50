"""An iteration that a stop request interrupted within its update: what its checkpoint holds, and when that still fits.

Weights have moved by then, so the log-probs and values from before the update cannot be computed again. They are saved
as float32, exactly, by each replica for its share; advantages and returns are functions of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from megatron_vcppo.config import PpoConfig
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare, RolloutTable
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.rank_messages import broadcast_value
from megatron_vcppo.mcore.row_exchange import exchange_rows, values_of_leaders
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.stages.share_exchange import replica_of_each
from megatron_vcppo.stages.updates import UpdateMetrics

SCHEMA = 2
"""Of what a checkpoint holds; 1: outputs of the whole batch in one file, and another identity."""

_RowOfSchema1: TypeAlias = tuple[int, tuple[str, int, int, float | None]]
"""Place in the batch; prompt, sample, seed, reward."""


@dataclass(frozen=True)
class UpdateUnderWay:
    """The update of one batch; ``metrics`` grows with its optimizer steps."""

    share: RolloutShare
    outputs: ModelOutputs
    metrics: UpdateMetrics
    config: PpoConfig
    run_seed: int

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, over all models."""
        return self.metrics.num_all_steps

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text; the tensors are saved next to it."""
        identity = identity_of(self.share.batch, self.config, self.run_seed)
        return {"schema": SCHEMA, "identity": identity, "report": self.metrics.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """Model outputs by name: float32 [N] of this replica's share; what the rollouts hold is left to them."""
        outputs = self.outputs.by_name()
        del outputs["rollout_logprobs"]
        return outputs


@dataclass(frozen=True)
class Unfinished:
    """An update under way as a checkpoint has it."""

    schema: int
    identity: str
    """Of the rollouts and of how they were divided into optimizer steps."""
    metrics: dict[str, Any]
    tensor_files: tuple[Path, ...]
    """Model outputs by name, float32, in a file for the share of each replica."""

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], tensor_files: tuple[Path, ...]) -> "Unfinished":
        """state: what ``UpdateUnderWay`` gave; tensor_files: where its tensors are."""
        return cls(state.get("schema", 1), state["identity"], state["report"], tensor_files)

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, over all models."""
        return UpdateMetrics.from_state(self.metrics).num_all_steps

    def fits(self, part: RolloutPart, share: RolloutShare, config: PpoConfig, run_seed: int) -> bool:
        """Whether these are the rollouts, and the settings, that the optimizer steps so far were made with; collective.

        part: what this rank has of the batch from the engines.
        """
        if self.schema == SCHEMA:
            return self.identity == identity_of(share.batch, config, run_seed)
        return self.identity == identity_of_schema_1(part, share, config, run_seed)

    def outputs(self, share: RolloutShare) -> ModelOutputs:
        """The model outputs of this replica's share again, whatever the number of replicas was."""
        lengths = share.batch.lengths.numpy()
        writers = replica_of_each(share.batch.sequence_lengths, len(self.tensor_files))
        pieces: dict[str, dict[int, Tensor]] = {}
        for number, path in enumerate(self.tensor_files):
            rows = np.flatnonzero(writers == number)
            ends = lengths[rows].cumsum()
            here = np.isin(rows, share.rows)
            with safe_open(path, "pt") as file:
                for name in [*file.keys()]:
                    saved, found = file.get_slice(name), pieces.setdefault(name, {})
                    for row, end in zip(rows[here].tolist(), ends[here].tolist(), strict=True):
                        found[row] = saved[end - int(lengths[row]) : end]
        outputs = {
            name: torch.cat([torch.zeros(0), *(found[row] for row in share.rows.tolist())])
            for name, found in pieces.items()
        }
        return ModelOutputs(**{"old_logprobs": None, **outputs}, rollout_logprobs=share.rollout_logprobs)


def identity_of(batch: RolloutTable, config: PpoConfig, run_seed: int) -> str:
    """Differs if other responses are trained on, or the same ones in other optimizer steps."""
    digest = xxhash.xxh3_128(_steps(config, run_seed))
    for column in ("digest", "response_length"):
        digest.update(batch.rows[column].tobytes())
    return digest.hexdigest()


def identity_of_schema_1(part: RolloutPart, share: RolloutShare, config: PpoConfig, run_seed: int) -> str:
    """The same as checkpoints of schema 1 have it, for which one replica reads all log-probs; collective."""
    batch = share.batch
    known = [(place, (r.prompt.prompt_id, r.sample_index, r.seed, r.reward)) for place, r in part.items()]
    named = sorted(row for rows in values_of_leaders(known, list[_RowOfSchema1]) for row in rows)
    lengths = batch.lengths.numpy()
    logprobs = exchange_rows(share.rollout_logprobs, lengths, share.replicas, np.zeros(len(batch), np.int64))
    digest = xxhash.xxh3_128(_steps(config, run_seed))
    digest.update(repr([row for _, row in named]).encode())
    digest.update(lengths.tobytes())
    for row in logprobs.split(lengths.tolist()) if len(logprobs) else ():
        padded = torch.zeros(int(lengths.max()))
        padded[: len(row)] = row
        digest.update(padded.numpy().tobytes())
    return broadcast_value(digest.hexdigest(), str, 0, device=runtime.device())


def _steps(config: PpoConfig, run_seed: int) -> bytes:
    steps: Sequence[int] = (run_seed, config.ppo_epochs, config.minibatches, config.critic.updates_per_actor_update)
    other = () if config.loss.kind == "clip" else (config.loss.kind,)  # what is saved depends on it
    return repr((steps, config.critic_only_iterations, *other)).encode()
