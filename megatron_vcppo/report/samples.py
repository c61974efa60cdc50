"""Which rollouts of an iteration are worth reading, and how a page shows them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from megatron_vcppo.records import Rollout

HEAD, TAIL = 6000, 2500
"""Characters of a text that are shown from its start and its end."""


REASONS: dict[str, Callable[[Rollout], float]] = {
    "best": lambda rollout: -_reward(rollout),
    "worst": lambda rollout: _reward(rollout),
    "longest": lambda rollout: -len(rollout.response_ids),
    "cut at the limit": lambda rollout: 0.0 if rollout.truncated else math.inf,
}
"""Why a rollout is shown → its rank, lowest first; infinity: never."""


@dataclass(frozen=True)
class Samples:
    """One stored iteration: what is said about all its rollouts, and those that are shown."""

    stage: str
    iteration: int
    num_rollouts: int
    num_correct: int
    num_cut: int
    mean_length: float
    chosen: list[tuple[str, Rollout]]
    """(reasons, rollout); a rollout with two reasons is there once."""


def choose(stage: str, iteration: int, rollouts: Iterable[Rollout], count: int = 2) -> Samples:
    """At most ``count`` rollouts for each of REASONS, in one pass that keeps no others.

    Equals keep their order, which is that of the prompts: an unbiased pick.
    """
    best: dict[str, list[Rollout]] = {reason: [] for reason in REASONS}
    num_rollouts = num_correct = num_cut = num_tokens = 0
    for rollout in rollouts:
        num_rollouts += 1
        num_correct += (rollout.reward or 0.0) > 0
        num_cut += rollout.truncated
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
    return Samples(stage, iteration, num_rollouts, num_correct, num_cut, mean_length, chosen)


def show(samples: Samples) -> str:
    """HTML of the chosen rollouts of an iteration, folded, under a line over all of them."""
    return (
        f"<h3>{escape(samples.stage)}, stored as iteration {samples.iteration}</h3>"
        f'<p class="soft">{samples.num_rollouts} rollouts: {samples.num_correct} correct, {samples.num_cut} cut, '
        f"mean length {samples.mean_length:.1f} tokens</p>"
        + "".join(_one(reasons, rollout) for reasons, rollout in samples.chosen)
    )


def _one(reasons: str, rollout: Rollout) -> str:
    reward = "not scored" if rollout.reward is None else f"{rollout.reward:+g}"
    tone = "good" if (rollout.reward or 0.0) > 0 else "bad"
    verdict = f" ({rollout.verdict})" if rollout.verdict else ""
    parts = (
        ("prompt", rollout.prompt.text),
        ("response", rollout.response_text),
        ("right answer", rollout.prompt.answer),
    )
    texts = "".join(f'<div class="part">{name}</div><pre>{escape(shorten(text))}</pre>' for name, text in parts)
    return (
        f'<details><summary><b>{escape(reasons)}</b>: <span class="{tone}">reward {reward}{escape(verdict)}</span>, '
        f"{len(rollout.response_ids)} tokens, ended by {escape(rollout.finish_reason)}, "
        f'<span class="soft">{escape(rollout.prompt.prompt_id)} sample {rollout.sample_index}</span></summary>'
        f"<div>{texts}</div></details>"
    )


def shorten(text: str) -> str:
    """The text, or its two ends if it is long."""
    left_out = len(text) - HEAD - TAIL
    if left_out <= 0:
        return text
    return f"{text[:HEAD]}\n[… {left_out:,} characters are left out here …]\n{text[-TAIL:]}"


def _reward(rollout: Rollout) -> float:
    """What was not scored counts as a little worse than anything that was."""
    return -1e9 if rollout.reward is None else rollout.reward
