"""An iteration that a stop request interrupted within its update: what its checkpoint holds, and when that still fits.

Weights have moved by then, so the log-probs and values from before the update cannot be computed again. They are saved
as float32, exactly; advantages and returns are functions of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_vcppo.config import PpoConfig
from megatron_vcppo.data.rollout_batch import ModelOutputs, RolloutBatch
from megatron_vcppo.stages.updates import UpdateMetrics


@dataclass(frozen=True)
class UpdateUnderWay:
    """The update of one batch; ``metrics`` grows with its optimizer steps."""

    batch: RolloutBatch
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
        identity = identity_of(self.batch, self.config, self.run_seed)
        return {"identity": identity, "report": self.metrics.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """Model outputs by name: float32 [valid tokens of the batch]; what the rollouts hold is left to them."""
        outputs = self.outputs.by_name()
        del outputs["rollout_logprobs"]
        return {name: tensor[self.batch.response_mask] for name, tensor in outputs.items()}


@dataclass(frozen=True)
class Unfinished:
    """An update under way as a checkpoint has it."""

    identity: str
    """Of the rollouts and of how they were divided into optimizer steps."""
    metrics: dict[str, Any]
    saved_outputs: dict[str, Tensor]
    """Model outputs by name: float32 [valid tokens of the batch]."""

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> "Unfinished":
        """state, tensors: what ``UpdateUnderWay`` gave."""
        return cls(state["identity"], state["report"], tensors)

    def state_dict(self) -> dict[str, Any]:
        """As it was loaded."""
        return {"identity": self.identity, "report": self.metrics}

    def tensors(self) -> dict[str, Tensor]:
        """As they were loaded: float32 [valid tokens of the batch] each."""
        return self.saved_outputs

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, over all models."""
        return UpdateMetrics.from_state(self.metrics).num_all_steps

    def fits(self, batch: RolloutBatch, config: PpoConfig, run_seed: int) -> bool:
        """Whether these are the rollouts, and the settings, that the optimizer steps so far were made with."""
        return self.identity == identity_of(batch, config, run_seed)

    def outputs(self, batch: RolloutBatch) -> ModelOutputs:
        """The model outputs [B, T] again, 0 beyond the responses."""
        found = {}
        for name, values in self.saved_outputs.items():
            found[name] = torch.zeros(batch.response_mask.shape)
            found[name][batch.response_mask] = values
        return ModelOutputs(rollout_logprobs=batch.rollout_logprobs, **found)


def identity_of(batch: RolloutBatch, config: PpoConfig, run_seed: int) -> str:
    """Differs if other responses are trained on, or the same ones in other optimizer steps."""
    steps = (run_seed, config.ppo_epochs, config.minibatches, config.critic.updates_per_actor_update)
    digest = xxhash.xxh3_128(repr((steps, config.critic_only_iterations)).encode())
    digest.update(repr([(r.prompt.prompt_id, r.sample_index, r.seed, r.reward) for r in batch.rollouts]).encode())
    digest.update(batch.lengths.numpy().tobytes())
    digest.update(batch.rollout_logprobs.numpy().tobytes())
    return digest.hexdigest()
