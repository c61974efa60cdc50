"""vcppo config: check a configuration and print it resolved, or explain every key."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        description="Check a configuration and print it resolved: defaults, then the file and what it includes, then "
        "the cluster's profile, then key=value. Starts nothing and needs no GPU: safe on a login node.",
    )
    parser.add_argument("config", type=Path, nargs="?", help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to override")
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--explain", nargs="?", const="", metavar="PREFIX", help="print the keys (below PREFIX)")
    parser.add_argument("--markdown", action="store_true", help="with --explain: as the page docs/configuration.md")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the resolved YAML, or the keys."""
    from megatron_vcppo.commands.arguments import print_note
    from megatron_vcppo.config.explain import explain, explain_markdown
    from megatron_vcppo.config.load import dump_config, load_config
    from megatron_vcppo.config.value_sources import local_overrides, profile_files
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.launch.checks import check_critics

    if args.explain is not None:
        print(explain_markdown(args.explain) if args.markdown else explain(args.explain), end="")
        return 0
    if args.config is None:
        raise UserError("vcppo config needs a configuration file, such as configs/demo/sft.yaml, or --explain")
    overrides = [*local_overrides(args.cluster), *args.overrides]
    config = load_config(args.config, overrides, profiles=profile_files(args.cluster), note=print_note)
    check_critics(config, config.stages)
    print(dump_config(config), end="")
    return 0
