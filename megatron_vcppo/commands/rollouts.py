"""``vcppo rollouts RUN --iteration N --worst K``: what the policy wrote in an iteration, the worst rewards first."""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megatron_vcppo.commands.arguments import positive
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Rollout
from megatron_vcppo.run.folder import RunFolder, StageFolder
from megatron_vcppo.run.log import printable

WIDTH = 110


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser("rollouts", description=__doc__.replace("``", ""), help="read stored rollouts")
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, or the folder of one of its stages")
    parser.add_argument("--stage", default="ppo", help="stage whose rollouts are read (ppo)")
    parser.add_argument("--iteration", type=int, help="default: the last one stored")
    parser.add_argument("--worst", type=positive, default=5, metavar="K", help="how many to show (5)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the rollouts."""
    from megatron_vcppo.run.rollout_store import read_rollouts, stored_iterations

    folder = find_folder(args.run_folder, args.stage)
    known = stored_iterations(folder)
    if not known:
        raise UserError(f"{folder}: no rollouts are stored")
    iteration = known[-1] if args.iteration is None else args.iteration
    rollouts = read_rollouts(folder, iteration)
    if not rollouts:
        raise UserError(f"{folder}: iteration {iteration} has no rollouts: its files are empty")
    print(f"iteration {iteration}: {summary(rollouts)}")
    for rollout in worst(rollouts, args.worst):
        print(printable("\n".join(["", *describe(rollout)])))
    return 0


def find_folder(folder: Path, stage: str) -> Path:
    """Where a run's stage, or ``folder`` if it is a stage's, has its rollouts. UserError if there are none."""
    run = RunFolder(folder)
    for rollouts in (run.stage(stage).rollouts, StageFolder(folder).rollouts):
        if rollouts.is_dir():
            return rollouts
    others = [other.name for other in run.stages() if other.rollouts.is_dir()]
    hint = f"; stages that have some: {', '.join(others)} (--stage)" if others else ""
    raise UserError(f"{folder}: stage {stage} has no rollouts{hint}")


def worst(rollouts: list[Rollout], count: int) -> list[Rollout]:
    """The lowest rewards first; unscored ones before them; among equals the lowest scores of a reward model, then
    longer responses. Not those that are still unfinished."""

    def badness(rollout: Rollout) -> tuple[float, float, int]:
        reward = float("-inf") if rollout.reward is None else rollout.reward
        return (reward, rollout.model_score or 0.0, -len(rollout.response_ids))

    return sorted((rollout for rollout in rollouts if not rollout.unfinished), key=badness)[:count]


def summary(rollouts: list[Rollout]) -> str:
    """One line over all."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    mean_reward = f"{sum(rewards) / len(rewards):.3f}" if rewards else "none"
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    truncated = sum(rollout.truncated for rollout in rollouts) / len(rollouts)
    versions = sorted({rollout.policy_version for rollout in rollouts})
    num_unfinished = sum(rollout.unfinished for rollout in rollouts)
    unfinished = f"{num_unfinished} unfinished, " if num_unfinished else ""
    return (
        f"{len(rollouts)} rollouts, mean reward {mean_reward}, mean length {sum(lengths) / len(lengths):.1f}, "
        f"{truncated:.1%} truncated at the token limit, {unfinished}policy version {', '.join(map(str, versions))}"
    )


def describe(rollout: Rollout) -> Iterator[str]:
    """The lines that show one rollout."""
    reward = "not scored" if rollout.reward is None else f"{rollout.reward:g}"
    score = "" if rollout.model_score is None else f", score {rollout.model_score:.3f}"
    num_sampled = len(rollout.response_ids) - rollout.num_observed
    mean_logprob = sum(rollout.rollout_logprobs) / max(1, num_sampled)
    tool = f" ({rollout.num_observed} by a tool in {len(rollout.observations)} calls)" if rollout.observations else ""
    yield (
        f"{rollout.prompt.prompt_id} sample {rollout.sample_index}: "
        f"reward {reward} ({rollout.verdict or 'no verdict'}){score}, "
        f"{len(rollout.response_ids)} tokens{tool}, ended by {rollout.finish_reason}, mean log-prob {mean_logprob:.3f}"
    )
    for title, text in (
        ("prompt", rollout.prompt.text),
        ("response", rollout.response_text),
        ("answer", rollout.prompt.answer),
    ):
        yield f"  {title}:"
        for line in text.splitlines() or [""]:
            yield from textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="    ") or [""]
