"""What ``vcppo make-task`` takes besides the folder; ``task`` of an experiment file is the same in YAML."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.generate import get_task


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the data and of the base model."""
    parser.add_argument(
        "--task", nargs="+", default=["running_sum"], help="running_sum (default), list_ops, search, tool_sum"
    )
    parser.add_argument("--steps", nargs=2, type=int, metavar=("MIN", "MAX"), help="difficulty: steps of a solution")
    parser.add_argument("--mistake-rate", type=float, default=0.2, help="probability of a wrong step (0.2)")
    parser.add_argument("--demonstrations", type=int, default=30_000, help="SFT samples per task (30000)")
    parser.add_argument("--validation", type=int, default=500, help="SFT validation samples per task (500)")
    parser.add_argument("--prompts", type=int, default=20_000, help="PPO prompts per task (20000)")
    parser.add_argument("--test", type=int, default=512, help="held-out prompts per task (512)")
    parser.add_argument(
        "--family", choices=("qwen3", "qwen3_moe", "llama"), default="qwen3", help="architecture (qwen3)"
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of the base model (2)")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the base model (64)")
    parser.add_argument("--head-size", type=int, default=32, help="size of an attention head (32)")
    parser.add_argument("--max-length", type=int, default=1024, help="positions of the base model (1024)")
    parser.add_argument("--seed", type=int, default=0)


def check_options(args: argparse.Namespace) -> None:
    """UserError for what no task can be made of."""
    for name in args.task:
        task = get_task(name)
        low, high = args.steps or task.default_steps
        if not 1 <= low <= high <= task.max_steps:
            raise UserError(f"--steps {low} {high}: task {name} takes 1 ≤ MIN ≤ MAX ≤ {task.max_steps}")
    for key in ("demonstrations", "validation", "prompts", "test", "layers", "width", "head_size", "max_length"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if args.width % args.head_size or args.head_size % 2:
        raise UserError(f"--width {args.width} must be a multiple of an even --head-size, which is {args.head_size}")
    if not -(2**63) <= args.seed < 2**63:
        raise UserError("--seed must fit into 64 bits")
    if not 0 <= args.mistake_rate <= 1:
        raise UserError(f"--mistake-rate {args.mistake_rate} is no probability")


class _OneLine(argparse.ArgumentParser):
    """A parser whose errors are the caller's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def check_arguments(arguments: Sequence[str]) -> None:
    """UserError if ``vcppo make-task`` would refuse these arguments, which are without --out."""
    parser = _OneLine(add_help=False, allow_abbrev=False)
    add_options(parser)
    check_options(parser.parse_args(arguments))
