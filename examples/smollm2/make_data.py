"""Writes the problems of reasoning-gym's leg_counting, and worked solutions of some for SFT: python make_data.py OUT.

A checksum of a problem's text decides whether it is held out, so no test problem is among the others, and the problems
of PPO are others than those of SFT.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_vcppo.tasks.reasoning_gym import rows

SETTINGS: dict[str, Any] = {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 15}
SFT_TRAIN, SFT_VALIDATION, PROMPTS = 1024, 64, 4096
"""Numbers of problems; the first ones of the training split are those of SFT."""
TEST = 300


def main(out: Path) -> None:
    """Write sft_train, sft_validation, prompts_train and prompts_test (.jsonl) into ``out``."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    train = problems({"size": SFT_TRAIN + SFT_VALIDATION + PROMPTS, "seed": 1})
    shown = [
        row | {"response": worked_solution(counts_of(row), ANIMALS)} for row in train[: SFT_TRAIN + SFT_VALIDATION]
    ]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "sft_train.jsonl", shown[:SFT_TRAIN])
    write(out / "sft_validation.jsonl", shown[SFT_TRAIN:])
    write(out / "prompts_train.jsonl", train[SFT_TRAIN + SFT_VALIDATION :])
    write(out / "prompts_test.jsonl", problems({"size": TEST, "seed": 2, "split": "test"}))


def problems(options: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of leg_counting, whose prompt is only the question: half of the tokens, and SFT shows the form of answers.

    options: as in a source ``reasoning_gym:leg_counting?…``.
    """
    return [row | {"prompt": question_of(row["prompt"])} for row in rows("leg_counting", SETTINGS | options)]


def question_of(prompt: str) -> str:
    """How many legs …?, without the sentences around it."""
    found = re.search(r"how many legs are there .*\?", prompt)
    assert found is not None, "another version of reasoning-gym"
    return found[0].capitalize()


def counts_of(row: Mapping[str, str]) -> dict[str, int]:
    """{animal: how many} of a row, from the metadata of its problem."""
    from reasoning_gym import create_dataset

    named = json.loads(row["answer"])
    counts: dict[str, int] = create_dataset(named["dataset"], **named["settings"])[named["index"]]["metadata"][
        "animals"
    ]
    return counts


def worked_solution(counts: Mapping[str, int], legs: Mapping[str, int]) -> str:
    """One product a line, then the sums from left to right, and the answer behind ####.

    counts: {animal: how many}; legs: {animal: legs of one}.
    """
    products = [count * legs[animal] for animal, count in counts.items()]
    sums = list(accumulate(products))
    lines = [f"{count} * {legs[animal]} = {count * legs[animal]}" for animal, count in counts.items()]
    lines += [f"{before} + {added} = {after}" for before, added, after in zip(sums, products[1:], sums[1:])]
    return "\n".join([*lines, f"#### {sums[-1]}"])


def write(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
