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

from megatron_vcppo.config import Config
from megatron_vcppo.data.rollout_batch import RolloutBatch
from megatron_vcppo.stages.updates import UpdateMetrics


@dataclass(frozen=True)
class Unfinished:
    """As it is in a checkpoint."""

    identity: str
    """Of the rollouts and of how they were divided into optimizer steps."""
    report: dict[str, Any]
    tensors: dict[str, Tensor]
    """Model outputs by name: float32 [valid tokens of the batch]."""

    @classmethod
    def of(
        cls, batch: RolloutBatch, fields: Mapping[str, Tensor], report: UpdateMetrics, config: Config
    ) -> "Unfinished":
        """fields: [B, T]; what the rollouts hold themselves is left to them."""
        outputs = {name: tensor[batch.response_mask] for name, tensor in fields.items() if name != "rollout_logprobs"}
        return cls(identity_of(batch, config), report.state_dict(), outputs)

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> "Unfinished":
        """state: what ``state_dict`` gave."""
        return cls(state["identity"], state["report"], tensors)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text; the tensors are saved next to it."""
        return {"identity": self.identity, "report": self.report}

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far, over all models."""
        return sum(len(steps) for steps in self.report["skipped"].values())

    def fits(self, batch: RolloutBatch, config: Config) -> bool:
        """Whether these are the rollouts, and the settings, that the optimizer steps so far were made with."""
        return self.identity == identity_of(batch, config)

    def fields(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """The model outputs [B, T] again, 0 beyond the responses."""
        found = {"rollout_logprobs": batch.rollout_logprobs}
        for name, values in self.tensors.items():
            found[name] = torch.zeros(batch.response_mask.shape)
            found[name][batch.response_mask] = values
        return found


def identity_of(batch: RolloutBatch, config: Config) -> str:
    """Differs if other responses are trained on, or the same ones in other optimizer steps."""
    settings = config.ppo
    steps = (config.run.seed, settings.ppo_epochs, settings.minibatches, settings.critic.updates_per_actor_update)
    digest = xxhash.xxh3_128(repr((steps, settings.critic_only_iterations)).encode())
    digest.update(repr([(r.prompt.prompt_id, r.sample_index, r.seed, r.reward) for r in batch.rollouts]).encode())
    digest.update(batch.lengths.numpy().tobytes())
    digest.update(batch.rollout_logprobs.numpy().tobytes())
    return digest.hexdigest()
