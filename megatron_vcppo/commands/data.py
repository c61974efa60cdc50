"""``vcppo data inspect CONFIG``: what a run would read, as tokens; exit code 1 if something is wrong with it.

Wrong is: bad or too long samples at which a run stops, or more than 5 % of them otherwise; prompts of which more than
half are copies; held-out prompts that training has, too, or half of their 13-grams.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcppo.commands.arguments import positive, prepare, print_note
from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES
from megatron_vcppo.errors import FAILED
from megatron_vcppo.run.log import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_vcppo.data.inspection import Inspected


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser("data", description=__doc__.replace("``", ""), help="look at the data of a run")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="counts, lengths, duplicates, overlap, samples")
    inspect.add_argument("config", type=Path, help="configuration file (YAML)")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to override")
    inspect.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    inspect.add_argument(
        "--samples", type=positive, default=2, metavar="N", help="how many of each source to print (2)"
    )
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what there is to say; returns 1 if something is wrong."""
    _, config = prepare(args.config, args.overrides, args.cluster, note=print_note)
    from megatron_vcppo.data.contamination import compare
    from megatron_vcppo.data.template_check import check_chat_template
    from megatron_vcppo.data.vocabulary import check_vocabulary

    with _without_torch():
        from megatron_vcppo.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.model.hf)
    check_chat_template(Path(config.model.hf))
    if note := check_vocabulary(Path(config.model.hf)):
        print(f"note: {note}")
    training: list[Inspected] = []
    held_out: list[Inspected] = []
    problems: list[str] = []
    for found in (*_examples(config, tokenizer, args.samples), *_problems(config, tokenizer, args.samples)):
        print(printable("\n".join(found.lines())), flush=True)
        problems += found.problems()
        (held_out if found.key in ("sft.validation", "prompts.test") else training).append(found)
    # SFT's validation loss is measured on answers, so only its own training data count.
    pairs = [(a, b) for a in training for b in held_out if b.key == "prompts.test" or a.key.startswith("sft.")]
    for known, new in pairs:
        found_overlap = compare(known.key, known.prompts, new.key, new.prompts)
        print(*found_overlap.lines(), sep="\n", end="\n" if found_overlap.shares else "")
        problems += found_overlap.problems()
    for problem in problems:
        print(printable(f"wrong: {problem}"))
    if not problems:
        print("nothing is wrong")
    return FAILED if problems else 0


@contextmanager
def _without_torch() -> Iterator[None]:
    """Meanwhile transformers finds no torch, whose import takes longer than everything else here.

    A tokenizer does not need it. Where torch was imported before, nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it would warn that there are no models
    before = os.environ.get(name)
    os.environ[name] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import fails, as if it were not installed
    try:
        yield
    finally:
        del sys.modules["torch"]
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _examples(config: Config, tokenizer: "PreTrainedTokenizerBase", num_shown: int) -> "Iterator[Inspected]":
    if "sft" not in config.stages:
        return
    from megatron_vcppo.data.inspection import Inspected, prompt_texts, show
    from megatron_vcppo.data.prompt_format import PromptFormat
    from megatron_vcppo.data.sft_dataset import SftKeys, load_sft_dataset
    from megatron_vcppo.data.vocabulary import stop_ids

    for key, source in _sources("sft", config.sft.train, config.sft.mix, config.sft.validation):
        dataset, report = load_sft_dataset(
            source,
            tokenizer,
            sys.maxsize,
            "skip",
            SftKeys.of(config.sft),
            how=PromptFormat.of(config.prompts),
            stops=stop_ids(Path(config.model.hf)),
        )
        yield Inspected(
            key=key,
            report=report,
            stops_run=config.sft.bad_samples == "error",
            limits={"model.max_length": config.model.max_length},
            lengths=dataset.lengths,
            prompts=prompt_texts(tokenizer, dataset),
            shown=[show(tokenizer, dataset[index]) for index in range(min(num_shown, len(dataset)))],
        )


def _problems(config: Config, tokenizer: "PreTrainedTokenizerBase", num_shown: int) -> "Iterator[Inspected]":
    if set(config.stages).isdisjoint(ENGINE_STAGES):
        return
    import numpy as np

    from megatron_vcppo.data.inspection import Inspected, as_sequences, prompt_texts, show
    from megatron_vcppo.data.prompt_format import PromptFormat
    from megatron_vcppo.data.prompts import PromptKeys, load_prompts
    from megatron_vcppo.rewards.registry import check_answer, resolve_verifiers

    room = config.model.max_length - config.rollout.max_tokens
    verifiers = resolve_verifiers(config.prompts.verifiers, config.rewards.code)
    for key, source in _sources("prompts", config.prompts.train, config.prompts.mix, config.prompts.test):
        prompts, report = load_prompts(
            source,
            tokenizer,
            sys.maxsize,
            "skip",
            PromptKeys.of(config.prompts),
            known_tasks=verifiers,
            check_answer=partial(check_answer, verifiers),
            how=PromptFormat.of(config.prompts),
        )
        sequences = as_sequences(prompts)
        yield Inspected(
            key=key,
            report=report,
            stops_run=config.prompts.bad_samples == "error",
            limits={
                "model.max_length less one token of a response": config.model.max_length - 1,
                "less rollout.max_tokens: responses get less room": room,
            },
            lengths=np.array([len(sequence) for sequence in sequences]),
            prompts=prompt_texts(tokenizer, sequences),
            shown=[
                f"{show(tokenizer, sequence)} | answer {prompt.answer} | task {prompt.task}"
                for prompt, sequence in zip(prompts[:num_shown], sequences[:num_shown], strict=True)
            ],
        )


def _sources(section: str, train: str, mix: dict[str, float], held_out: str | None) -> Iterator[tuple[str, str]]:
    """(key, source) of a section."""
    yield f"{section}.train", train
    yield from ((f"{section}.mix {source}", source) for source in mix if source != train)
    if held_out:
        yield ("sft.validation" if section == "sft" else "prompts.test"), held_out
