"""vcppo sweep: several chains, one table."""

import argparse
import json
from pathlib import Path

from megatron_vcppo.commands.arguments import add_base_argument
from megatron_vcppo.run.folder import RunFolder


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sweep",
        description="One chain for every combination of key=[a, b] values, in run.dir/0, run.dir/1, …; called again, "
        "it goes on with what is not done. vcppo sweep --results FOLDER prints the table.",
    )
    parser.add_argument("config", type=Path, nargs="?", help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=[a,b]", help="what varies; key=value for what does not")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start every chain at this stage")
    add_base_argument(parser)
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="print the table of a sweep")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the chains, or show what they gave."""
    from megatron_vcppo.commands.arguments import chosen_stages, prepare
    from megatron_vcppo.config.load import load_config
    from megatron_vcppo.config.value_sources import LOCAL, profile_files
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.launch.inherit import take_stages
    from megatron_vcppo.launch.sweep_points import points, write_points

    if args.results:
        print(text_table(results(args.results)))
        return 0
    if args.config is None:
        raise UserError("vcppo sweep needs a configuration file and key=[a, b], or --results FOLDER")
    made, fixed = points(args.overrides)
    parent = Path(load_config(args.config, fixed, profiles=profile_files(args.cluster)).run.dir).absolute()
    overrides = [[*fixed, *point.overrides, f"run.dir={parent / point.name}"] for point in made]
    prepared = [prepare(args.config, values, args.cluster) for values in overrides]  # all, before the first is queued
    write_points(parent, made)
    code = 0
    for point, (folder, config) in zip(made, prepared, strict=True):
        stages = chosen_stages(list(config.stages), args.first, None, None)
        if args.base:
            take_stages(folder, config, args.base, args.first)
        print(f"{point.name}: {' '.join(point.overrides)}", flush=True)
        if config.cluster.name == LOCAL:
            from megatron_vcppo.launch.local_chain import run_chain

            code = max(code, run_chain(folder, config, stages))
        else:
            from megatron_vcppo.slurm.submission import resolve_python, submit

            jobs = submit(folder, config, stages, resolve_python(config))
            print("  " + (", ".join(f"{stage} {job}" for stage, job in jobs.items()) or "done before"))
    print(f"results: vcppo sweep --results {parent}")
    return code


SHOWN_OF_PPO = ("rollout/accuracy", "rollout/length_mean", "critic/explained_variance")


def results(folder: Path) -> list[dict[str, object]]:
    """One row per chain: its values, the stage it is at, PPO's newest numbers (before PPO: that stage's), and what the
    evaluation found, in percent."""
    from megatron_vcppo.launch.sweep_points import read_points
    from megatron_vcppo.run.config_file import open_run
    from megatron_vcppo.slurm.chain_status import run_status

    rows = []
    for point in read_points(folder):
        run = RunFolder(folder / point.name)
        row: dict[str, object] = {"run": point.name, **dict(override.split("=", 1) for override in point.overrides)}
        if run.config.exists():
            _, config = open_run(run.path)
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
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {f"avg of {row['name']}": f"{100 * row['avg']:.1f} ± {100 * row['avg_interval']:.1f}" for row in found}


def text_table(rows: list[dict[str, object]]) -> str:
    """Rows of possibly different columns as aligned text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [columns, *([cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
