"""The order in which samples are trained on: a function of (seed, samples seen), so that a resume is exact."""

from typing import Any

import numpy as np

from megatron_vcppo.data.seeds import epoch_seed
from megatron_vcppo.errors import UserError


class EpochOrder:
    """An endless stream of epochs, each a fresh permutation of all samples, and a place in it.

    Batches cross the border between epochs: each is full, and each sample comes exactly once in each epoch. The place
    is one number, how many samples were handed out, so batch size and number of ranks may change between two runs.
    """

    def __init__(self, num_samples: int, seed: int, what: str = "data") -> None:
        """what: how a message names the samples."""
        if num_samples < 1:
            raise UserError(f"{what}: no samples")
        self.num_samples = num_samples
        self.seed = seed
        self.samples_seen = 0
        self._what = what
        self._permutation: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next sample belongs to."""
        return self.samples_seen // self.num_samples

    def next(self, batch_size: int) -> list[tuple[int, int]]:
        """Hand out the next ``batch_size`` samples as (epoch, sample index)."""
        batch = [self.at(place) for place in range(self.samples_seen, self.samples_seen + batch_size)]
        self.samples_seen += batch_size
        return batch

    def at(self, place: int) -> tuple[int, int]:
        """(epoch, sample index) of the sample at this place from the start, whether it was handed out or not."""
        epoch, position = divmod(place, self.num_samples)
        return epoch, int(self._of_epoch(epoch)[position])

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain numbers for a checkpoint."""
        return {"samples_seen": self.samples_seen, "num_samples": self.num_samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises UserError if the data or the seed are not the same."""
        for key, ours in (("num_samples", self.num_samples), ("seed", self.seed)):
            if state[key] != ours:
                raise UserError(
                    f"{self._what}: the checkpoint was made with {key} {state[key]}, now it is {ours}; "
                    "an exact resume needs the same data and run.seed"
                )
        self.samples_seen = state["samples_seen"]

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (
                epoch,
                np.random.default_rng(epoch_seed(self.seed, epoch)).permutation(self.num_samples),
            )
        return self._permutation[1]
