"""Several sources as one: how often each of their samples comes in an epoch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_vcppo.data.seeds import mixture_seed
from megatron_vcppo.records import Prompt


def training_sources(train: str, mix: Mapping[str, float]) -> dict[str, float]:
    """Source → weight: ``train`` once, unless ``mix`` gives it another weight, and those that mix adds."""
    return {train: 1.0} | dict(mix)


class Mixture:
    """Which sample stands at each place of an epoch, before the places are shuffled (data/epoch_order.py).

    A weight of 1 is each sample of a source once, 2 each twice, 0.25 a quarter of them, 1.5 each once and half of them
    twice. The part is drawn again for every epoch, from the seed and the epoch alone, so a resume draws the same one.
    """

    def __init__(self, sources: Sequence[tuple[int, float]], seed: int) -> None:
        """sources: (number of samples, weight) of each, in the order in which their samples are numbered."""
        self._sources, self._seed = tuple(sources), seed
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None
        self.num_samples = sum(int(weight) * count + round(weight % 1 * count) for count, weight in sources)
        """In every epoch."""

    def at(self, epoch: int, place: int) -> tuple[int, int]:
        """(index of the sample over all sources, how often the epoch has it at earlier places)."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, *self._draw(epoch))
        return int(self._drawn[1][place]), int(self._drawn[2][place])

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        indices: list[np.ndarray] = []
        copies: list[np.ndarray] = []
        first = 0
        for number, (count, weight) in enumerate(self._sources):
            whole = int(weight)
            random = np.random.default_rng(mixture_seed(self._seed, epoch, number))
            chosen = random.permutation(count)[: round(weight % 1 * count)]
            indices += [np.arange(first, first + count)] * whole + [first + np.sort(chosen)]
            copies += [np.full(count, copy) for copy in range(whole)] + [np.full(len(chosen), whole)]
            first += count
        return np.concatenate(indices), np.concatenate(copies)


def join_prompts(sources: Iterable[list[Prompt]]) -> list[Prompt]:
    """The prompts of all sources; where files have the same name, the ids of the second one's get ``~1``, ….

    Example: train:7 of two files train.jsonl are train:7 and train:7~1.
    """
    joined = []
    used: Counter[str] = Counter()
    for prompts in sources:
        for prompt in prompts:
            number = used[prompt.prompt_id]
            used[prompt.prompt_id] += 1
            joined.append(replace(prompt, prompt_id=f"{prompt.prompt_id}~{number}") if number else prompt)
    return joined
