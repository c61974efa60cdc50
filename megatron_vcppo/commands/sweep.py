"""vcppo sweep: several chains, one table."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.commands.arguments import add_base_argument, check_not_queued, checked_stages, prepare, print_note
from megatron_vcppo.config import Config
from megatron_vcppo.config.value_sources import path_override
from megatron_vcppo.errors import DONE, SAVED
from megatron_vcppo.launch.sweep_points import Point, points, read_points, write_points
from megatron_vcppo.run.folder import RunFolder

SHOWN_OF_PPO = ("rollout/accuracy", "rollout/length_mean", "critic/explained_variance")


@dataclass(frozen=True)
class Chain:
    """One point of the sweep, checked."""

    point: Point
    run: RunFolder
    config: Config
    stages: list[str]
    taken: list[Path]
    """Finished stages of --base that it starts from."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sweep",
        description="One chain for every combination of key=[a, b] values, in run.dir/0, run.dir/1, …; called again, "
        "it continues with the stages that are not done. vcppo sweep --results FOLDER prints the table.",
    )
    parser.add_argument("config", type=Path, nargs="?", help="configuration file (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=[a,b]", help="keys to vary; key=value: same for all chains"
    )
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start every chain at this stage")
    add_base_argument(parser)
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="print the table of a sweep")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the chains, or print their results."""
    from megatron_vcppo.config.sections.cluster import LOCAL
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.launch.inherit import stages_to_take

    if args.results:
        from megatron_vcppo.report.text_table import text_table

        print(text_table(results(args.results), sys.stdout))
        return 0
    if args.config is None:
        raise UserError("vcppo sweep needs a configuration file and key=[a, b], or --results FOLDER")
    made, fixed = points(args.overrides)
    parent = prepare(args.config, [*fixed, *made[0].overrides], args.cluster, note=print_note)[0].path
    chains = []
    for point in made:  # all are checked before anything is written
        overrides = [*fixed, *point.overrides, path_override("run.dir", parent / point.name)]
        folder, config = prepare(args.config, overrides, args.cluster)
        stages = checked_stages(folder, config, args.first)
        chains.append(Chain(point, folder, config, stages, stages_to_take(folder, config, args.base, args.first)))
    if any(chain.config.cluster.name != LOCAL for chain in chains):
        from megatron_vcppo.slurm.slurm_cli import check_slurm_installed

        check_slurm_installed()
    write_points(parent, made)
    code = start_all(chains)
    print(f"results: vcppo sweep --results {parent}")
    return code


def start_all(chains: Sequence[Chain]) -> int:
    """Run the chains one after another, or queue them; returns the worst exit code. A request to stop ends it."""
    from megatron_vcppo.config.sections.cluster import LOCAL
    from megatron_vcppo.launch.local_chain import stop_requests

    if chains[0].config.cluster.name != LOCAL:
        return max(start(chain) for chain in chains)
    code = DONE
    with stop_requests() as requests:
        for chain in chains:
            if requests["save"]:
                return code or SAVED
            code = max(code, start(chain))
    return code


def start(chain: Chain) -> int:
    """Run one chain here, or queue it; returns the exit code."""
    from megatron_vcppo.config.sections.cluster import LOCAL

    print(f"{chain.point.name}: {' '.join(chain.point.overrides)}", flush=True)
    if chain.config.cluster.name == LOCAL:
        from megatron_vcppo.launch.local_chain import run_chain

        check_not_queued(chain.run)
        return run_chain(chain.run, chain.config, chain.stages, taken=chain.taken)
    from megatron_vcppo.slurm.submission import resolve_python, submit

    jobs = submit(chain.run, chain.config, chain.stages, resolve_python(chain.config), chain.taken)
    print("  " + (", ".join(f"{stage} {job}" for stage, job in jobs.items()) or "done before"))
    return 0


def results(folder: Path) -> list[dict[str, object]]:
    """One row per chain: its values, the stage it is at, PPO's newest numbers (before PPO: that stage's), and what the
    evaluation found, in percent."""
    from megatron_vcppo.run.config_file import open_run
    from megatron_vcppo.slurm.chain_status import run_status

    rows = []
    for point in read_points(folder):
        run = RunFolder(folder / point.name)
        row: dict[str, object] = {"run": point.name, **dict(override.split("=", 1) for override in point.overrides)}
        if run.config.exists():
            _, config = open_run(run.path, complete=False)
            reached = [status for status in run_status(run, config) if status.attempts]
            if reached:
                row |= {"stage": reached[-1].stage, "state": reached[-1].state}
                newest = (run.stage("ppo").recent_metrics() or [{}])[-1]
                row |= {name: newest[name] for name in SHOWN_OF_PPO if name in newest} or reached[-1].metrics
            row |= evaluation(run.stage("evaluate").results)
        rows.append(row)
    return rows


def evaluation(path: Path) -> dict[str, object]:
    """Example: ``{"avg of sft": "45.3 ± 4.3", "avg of ppo": "83.4 ± 3.2"}``; empty before the evaluation is done."""
    from megatron_vcppo.report.run_data import read_results

    found = read_results(path)
    return {f"avg of {row['name']}": f"{100 * row['avg']:.1f} ± {100 * row['avg_interval']:.1f}" for row in found}
