"""What became of each sample: counted, named by place, never silent."""

from dataclasses import dataclass, field

from megatron_vcppo.data.readers import sample_name
from megatron_vcppo.errors import UserError

ON_BAD_SAMPLE = ("error", "skip", "truncate")
_SHOWN = 10


class BadSample(Exception):
    """This one sample cannot be used as it is; a DataReport counts it by ``kind``, and ``detail`` explains."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass
class DataReport:
    """Counts of one source. ``on_bad_sample``: error stops with the list of bad samples, skip and truncate continue.

    Example of ``str(report)``: ``train.jsonl: 1000 samples, 997 used, 2 truncated, 3 skipped`` and then a line per
    problem: ``  2 × empty response: train.jsonl:17, train.jsonl:90``.
    """

    source: str
    on_bad_sample: str
    num_samples: int = 0
    num_used: int = 0
    num_truncated: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)
    """Problem → the first sample numbers that have it."""
    counts: dict[str, int] = field(default_factory=dict)
    """Problem → how many samples have it."""
    _details: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ON_BAD_SAMPLE:
            raise UserError(f"bad_samples: {self.on_bad_sample!r} is not one of {', '.join(ON_BAD_SAMPLE)}")

    def bad(self, number: int, problem: BadSample) -> None:
        """Count a bad sample. Raises UserError with on_bad_sample error once ten are known; see ``finish``."""
        kind = problem.kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.problems.setdefault(kind, [])
        if len(places) < _SHOWN:
            places.append(number)
        if self.on_bad_sample == "error":
            self._details.append(f"{sample_name(self.source, number)}: {problem}")
            if len(self._details) == _SHOWN:
                self._raise("at least ")

    def finish(self) -> None:
        """The source is read. Raises UserError if nothing is left, or for bad samples with on_bad_sample error."""
        if self.on_bad_sample == "error" and self._details:
            self._raise("")
        if not self.num_used:
            raise UserError(f"no usable sample in {self}" if self.num_samples else f"{self.source} holds no sample")

    def __str__(self) -> str:
        skipped = self.num_samples - self.num_used
        head = f"{self.source}: {self.num_samples:,} samples, {self.num_used:,} used"
        head += f", {self.num_truncated:,} truncated" if self.num_truncated else ""
        head += f", {skipped:,} skipped" if skipped else ""
        lines = [head]
        for kind, count in self.counts.items():
            places = ", ".join(sample_name(self.source, number) for number in self.problems[kind])
            lines.append(f"  {count:,} × {kind}: {places}{', …' if count > len(self.problems[kind]) else ''}")
        return "\n".join(lines)

    def _raise(self, at_least: str) -> None:
        lines = "\n  ".join(self._details)
        advice = "fix them, or set bad_samples to skip or truncate"
        raise UserError(f"{self.source}: {at_least}{len(self._details)} bad samples; {advice}:\n  {lines}")
