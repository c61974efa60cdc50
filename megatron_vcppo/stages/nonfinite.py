"""Optimizer steps whose loss or gradient was not finite: skipped, counted, and too many in a row end the stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_vcppo.errors import UserError


@dataclass
class NonfiniteUpdates:
    """How many of the last steps of each model were skipped in a row; plain numbers, saved with the checkpoint."""

    limit: int
    in_a_row: dict[str, int] = field(default_factory=dict)
    """actor | critic → steps"""

    def count(self, skipped: Mapping[str, Sequence[bool]]) -> str:
        """Take in, per model, whether each step was skipped; returns what to warn about, "" if nothing was."""
        texts = []
        for who, steps in skipped.items():
            for one in steps:
                self.in_a_row[who] = self.in_a_row.get(who, 0) + 1 if one else 0
            if any(steps):
                texts.append(f"{sum(steps)} of {len(steps)} updates of the {who} ({self.in_a_row[who]} in a row)")
        return f"skipped {', '.join(texts)}: loss or gradient was not finite" if texts else ""

    @property
    def too_many(self) -> bool:
        """Whether the stage has to end."""
        return max(self.in_a_row.values(), default=0) >= self.limit

    def error(self, stage: str, saved_at: int) -> UserError:
        """What ends the stage."""
        who = max(self.in_a_row, key=lambda name: self.in_a_row[name])
        return UserError(
            f"{stage}: {self.in_a_row[who]} updates of the {who} in a row had a loss or gradient that was not finite "
            f"(ppo.skip_limit {self.limit}); saved at iteration {saved_at}. Lower its learning rate, or train in "
            "float32, and resume"
        )
