"""Several sources as one: how often each of their samples comes in an epoch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_vcppo.records import Prompt


def training_sources(train: str, mix: Mapping[str, float]) -> dict[str, float]:
    """Source → weight: ``train`` once, unless ``mix`` gives it another weight, and those that mix adds."""
    return {train: 1.0} | dict(mix)


def repeated(num_samples: int, weight: float) -> list[int]:
    """The samples of one epoch, by index: 1 is each once, 2 each twice, 0.25 a quarter of them, 1.5 half of them twice.

    A part is chosen at random and is the same in every epoch and on every rank.
    """
    whole = int(weight)
    num_chosen = round((weight - whole) * num_samples)
    chosen = np.sort(np.random.default_rng(0).permutation(num_samples)[:num_chosen])
    return [*range(num_samples)] * whole + chosen.tolist()


def mix_prompts(sources: Sequence[tuple[list[Prompt], float]]) -> list[Prompt]:
    """The prompts of (prompts, weight), one source after the other; a second prompt of the same id gets ``+1``, …"""
    mixed = []
    used: Counter[str] = Counter()
    for prompts, weight in sources:
        for index in repeated(len(prompts), weight):
            prompt = prompts[index]
            copy = used[prompt.prompt_id]
            used[prompt.prompt_id] += 1
            mixed.append(replace(prompt, prompt_id=f"{prompt.prompt_id}+{copy}") if copy else prompt)
    return mixed
