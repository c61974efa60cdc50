"""``vcppo make-task``: base model, SFT data and prompts of the synthetic long chain-of-thought tasks."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import read_json, replacing
from megatron_vcppo.tasks.options import add_options, check_options

_DONE = "make_task.json"
_FILES = ("base_model", "sft_train.jsonl", "sft_validation.jsonl", "prompts_train.jsonl", "prompts_test.jsonl")
_DATA_SETTINGS = ("task", "steps", "mistake_rate", "demonstrations", "validation", "prompts", "test", "seed")
_MODEL_SETTINGS = ("family", "layers", "width", "head_size", "max_length")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "make-task",
        description="Writes OUT/base_model (Hugging Face checkpoint with tokenizer), sft_train.jsonl, "
        "sft_validation.jsonl, prompts_train.jsonl, prompts_test.jsonl. Test prompts are never training prompts.",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write everything to a temporary folder and rename it; a finished folder with the same settings is kept."""
    out: Path = args.out
    settings = settings_of(args)
    if is_made(args, "remove it or choose another --out"):
        print(f"{out} is already made with these settings")
        return 0
    check_options(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as folder:
        folder.mkdir()
        counts = _write_data(args, folder)

        from megatron_vcppo.tasks.base_model import write_base_model  # imports torch and transformers

        num_parameters = write_base_model(
            folder / "base_model", args.family, args.layers, args.width, args.head_size, args.max_length, args.seed
        )
        record = {"settings": settings, "rows": counts, "parameters": num_parameters}
        (folder / _DONE).write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{out}: base model with {num_parameters:,} parameters; " + ", ".join(f"{n:,} {k}" for k, n in counts.items())
    )
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the files depend on."""
    return {name: getattr(args, name) for name in _DATA_SETTINGS + _MODEL_SETTINGS}


def is_made(args: argparse.Namespace, advice: str) -> bool:
    """Whether OUT has the whole task. UserError with the advice if it has something else, or the task in part."""
    out: Path = args.out
    if not out.exists():
        return False
    if not (out / _DONE).is_file():
        raise UserError(f"{out} exists, and is no task: {advice}")
    if missing := [name for name in _FILES if not (out / name).exists()]:
        raise UserError(f"{out} is damaged, it has no {missing[0]}: remove it")
    made = read_json(out / _DONE)
    if not isinstance(made, dict) or made.get("settings") != settings_of(args):
        raise UserError(f"{out} exists, made with other settings: {advice}")
    return True


def _write_data(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The four JSONL files; tasks are interleaved row by row. Returns file → rows."""
    from megatron_vcppo.tasks.generate import demonstration_rows, get_task, prompt_rows
    from megatron_vcppo.tasks.task import Style

    tasks = [get_task(name) for name in args.task]
    steps = {task.name: tuple(args.steps or task.default_steps) for task in tasks}
    style = Style(mistake_rate=args.mistake_rate)
    seed = args.seed
    files = {
        "sft_train": [demonstration_rows(t, "train", steps[t.name], seed, args.demonstrations, style) for t in tasks],
        "sft_validation": [
            demonstration_rows(t, "validation", steps[t.name], seed, args.validation, style) for t in tasks
        ],
        "prompts_train": [prompt_rows(t, "train", steps[t.name], seed, args.prompts) for t in tasks],
        "prompts_test": [prompt_rows(t, "test", steps[t.name], seed, args.test, unique=True) for t in tasks],
    }
    return {name: _write_rows(folder / f"{name}.jsonl", streams) for name, streams in files.items()}


def _write_rows(path: Path, streams: list[Iterator[dict[str, str]]]) -> int:
    count = 0
    with path.open("w") as file:
        for rows in zip(*streams, strict=True):
            for row in rows:
                file.write(json.dumps(row) + "\n")
                count += 1
    return count
