"""vcppo sweep: several chains, one table."""

import argparse
from pathlib import Path

from slurm.prepare import add_base_argument


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
    from megatron_vcppo.config.load import load_config
    from megatron_vcppo.config.sources import LOCAL, profile_files
    from megatron_vcppo.errors import UserError
    from slurm.base_run import take_stages
    from slurm.prepare import prepare
    from slurm.run_folder import chosen_stages
    from slurm.sweep import points, results, text_table, write_points

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
            from slurm.local import run_chain

            code = max(code, run_chain(folder, config, stages))
        else:
            from slurm.submit import resolve_python, submit

            jobs = submit(folder, config, stages, resolve_python(config))
            print("  " + (", ".join(f"{stage} {job}" for stage, job in jobs.items()) or "done before"))
    print(f"results: vcppo sweep --results {parent}")
    return code
