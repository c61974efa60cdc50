"""Which rollouts of an iteration are worth reading."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_vcppo.records import Rollout

HEAD, TAIL = 6000, 2500
"""Characters of a text that are shown from its start and its end."""


REASONS: dict[str, Callable[[Rollout], float]] = {
    "best": lambda rollout: -_reward(rollout),
    "worst": lambda rollout: _reward(rollout),
    "longest": lambda rollout: -len(rollout.response_ids),
    "truncated": lambda rollout: 0.0 if rollout.truncated else math.inf,
}
"""Why a rollout is shown → its rank, lowest first; infinity: never."""


@dataclass(frozen=True)
class Samples:
    """One stored iteration: numbers of all its finished rollouts, and those that are shown."""

    stage: str
    iteration: int
    num_rollouts: int
    num_correct: int
    num_truncated: int
    mean_length: float
    chosen: list[tuple[str, Rollout]]
    """(reasons, rollout); a rollout with two reasons is there once."""


def choose(stage: str, iteration: int, rollouts: Iterable[Rollout], count: int = 2) -> Samples:
    """At most ``count`` finished rollouts for each of REASONS, in one pass that keeps no others.

    Equals keep their order, which is that of the prompts: an unbiased pick.
    """
    best: dict[str, list[Rollout]] = {reason: [] for reason in REASONS}
    num_rollouts = num_correct = num_truncated = num_tokens = 0
    for rollout in rollouts:
        if rollout.unfinished:
            continue
        num_rollouts += 1
        num_correct += (rollout.reward or 0.0) > 0
        num_truncated += rollout.truncated
        num_tokens += len(rollout.response_ids)
        for reason, rank in REASONS.items():
            if rank(rollout) < math.inf:
                best[reason] = sorted([*best[reason], rollout], key=rank)[:count]
    reasons: dict[int, list[str]] = {}
    for reason, found in best.items():
        for rollout in found:
            reasons.setdefault(id(rollout), []).append(reason)
    shown = {id(rollout): rollout for found in best.values() for rollout in found}
    chosen = [(", ".join(reasons[key]), rollout) for key, rollout in shown.items()]
    mean_length = num_tokens / max(1, num_rollouts)
    return Samples(stage, iteration, num_rollouts, num_correct, num_truncated, mean_length, chosen)


def shorten(text: str) -> str:
    """The text, or its two ends if it is long."""
    num_hidden = len(text) - HEAD - TAIL
    if num_hidden <= 0:
        return text
    return f"{text[:HEAD]}\n[… {num_hidden:,} characters are not shown …]\n{text[-TAIL:]}"


def _reward(rollout: Rollout) -> float:
    """An unscored rollout counts as worse than any scored one."""
    return -1e9 if rollout.reward is None else rollout.reward
