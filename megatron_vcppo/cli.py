"""The `vcppo` command: one module per sub-command, imported only when it is called.

A sub-command is a module with ``add_parser(subparsers)``, which calls ``set_defaults(run=…)``, and
``run(args) -> exit code``; it is made known by one line in ``COMMANDS``.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from megatron_vcppo import __version__
from megatron_vcppo.errors import FAILED, SIGNALLED, USER_ERROR, UserError, system_error
from megatron_vcppo.run.access import writable_by_user_only
from megatron_vcppo.run.log import printable

COMMANDS = {
    "init": ("megatron_vcppo.commands.init", "write a first configuration for a model, data and a cluster"),
    "config": ("megatron_vcppo.commands.config", "check a configuration and print it resolved; explain every key"),
    "data": ("megatron_vcppo.commands.data", "look at the data of a run: lengths, duplicates, overlap, samples"),
    "convert": ("megatron_vcppo.commands.convert", "Hugging Face checkpoints to Megatron's and back, checked"),
    "make-task": ("megatron_vcppo.commands.make_task", "make a tiny base model and the data of a synthetic task"),
    "run": ("megatron_vcppo.commands.run", "run the chain on this machine, stage after stage"),
    "rollouts": ("megatron_vcppo.commands.rollouts", "what the policy wrote in an iteration, worst rewards first"),
    "report": ("megatron_vcppo.commands.report", "curves, diagnosis and rollouts of runs as one HTML page"),
    "submit": ("megatron_vcppo.commands.submit", "queue the chain on a Slurm cluster"),
    "status": ("megatron_vcppo.commands.status", "where a run stands: stages, jobs, progress, failures"),
    "list": ("megatron_vcppo.commands.list_runs", "the runs below a folder: stage, state, age, size"),
    "logs": ("megatron_vcppo.commands.logs", "what the roles of a run wrote"),
    "cancel": ("megatron_vcppo.commands.cancel", "cancel the jobs of a run"),
    "resume": ("megatron_vcppo.commands.resume", "queue again what is not done"),
    "clean": ("megatron_vcppo.commands.clean", "remove old checkpoints and rollouts of a run"),
    "plan": ("megatron_vcppo.commands.plan", "estimate memory, time, GPU-hours and disk of a chain"),
    "doctor": ("megatron_vcppo.commands.doctor", "check a cluster profile with short test jobs"),
    "completion": ("megatron_vcppo.commands.completion", "print a completion script for bash or zsh"),
    "sweep": ("megatron_vcppo.commands.sweep", "several chains, one table of results"),
    "experiment": ("megatron_vcppo.commands.experiment", "arms over seeds, with one report and a verdict"),
}
"""Name → (module, help); the order is that of ``vcppo --help``."""

EPILOG = "A user's mistake costs one line and exit code 2. vcppo COMMAND --help says more."


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this call: only the requested sub-command has its arguments, the others are names."""
    parser = argparse.ArgumentParser(
        prog="vcppo",
        description="Train long chain-of-thought models with Value-Calibrated PPO: Megatron-Core, vLLM, Slurm.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"megatron_vcppo {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        if name == wanted:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed call. key=value may stand before, between and after options, which argparse alone does not allow."""
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if unknown or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        args.overrides += rest
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit code. A UserError becomes one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    writable_by_user_only()
    try:
        args = parse(arguments)
        return int(args.run(args))
    except UserError as error:
        print(f"vcppo: error: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # vcppo … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        found = system_error(error)
        if found is None:
            raise
        print(f"vcppo: error: {printable(str(found))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("vcppo: interrupted", file=sys.stderr)
        return SIGNALLED + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
