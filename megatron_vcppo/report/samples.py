"""Which rollouts of an iteration are worth reading, and how a page shows them."""

from collections.abc import Sequence
from html import escape

from megatron_vcppo.records import Rollout
from megatron_vcppo.report.run_data import StoredRollouts

HEAD, TAIL = 6000, 2500
"""Characters of a text that are shown from its start and its end."""


def choose(rollouts: Sequence[Rollout], count: int = 2) -> list[tuple[str, Rollout]]:
    """(why, rollout): best and worst rewards, longest, cut at the token limit, at most ``count`` of each.

    Equal rewards keep their order, which is that of the prompts: an unbiased pick. A rollout that is chosen twice is
    there once, with both reasons.
    """

    def reward(rollout: Rollout) -> float:
        return float("-inf") if rollout.reward is None else rollout.reward

    groups = {
        "best": sorted(rollouts, key=reward, reverse=True),
        "worst": sorted(rollouts, key=reward),
        "longest": sorted(rollouts, key=lambda rollout: len(rollout.response_ids), reverse=True),
        "cut at the limit": [rollout for rollout in rollouts if rollout.truncated],
    }
    reasons: dict[int, list[str]] = {}
    chosen: dict[int, Rollout] = {}
    for reason, candidates in groups.items():
        for rollout in candidates[:count]:
            chosen[id(rollout)] = rollout
            reasons.setdefault(id(rollout), []).append(reason)
    return [(", ".join(reasons[key]), rollout) for key, rollout in chosen.items()]


def show(stored: StoredRollouts) -> str:
    """HTML of the chosen rollouts of an iteration, folded, under a line over all of them."""
    rollouts = stored.rollouts
    correct = sum((rollout.reward or 0.0) > 0 for rollout in rollouts)
    cut = sum(rollout.truncated for rollout in rollouts)
    length = sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts)
    shown = "".join(_one(reason, rollout) for reason, rollout in choose(rollouts))
    return (
        f"<h3>{escape(stored.stage)}, iteration {stored.iteration}</h3>"
        f'<p class="soft">{len(rollouts)} rollouts: {correct} correct, {cut} cut, mean length {length:.1f} tokens</p>'
        f"{shown}"
    )


def _one(reason: str, rollout: Rollout) -> str:
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
        f'<details><summary><b>{escape(reason)}</b>: <span class="{tone}">reward {reward}{escape(verdict)}</span>, '
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
