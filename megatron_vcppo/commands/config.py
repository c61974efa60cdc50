"""vcppo config: check a configuration and print it resolved, or explain every key."""

import argparse
import json
import textwrap
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the resolved YAML, or the keys."""
    from megatron_vcppo.config.load import dump_config, load_config
    from megatron_vcppo.config.value_sources import local_overrides, profile_files
    from megatron_vcppo.errors import UserError

    if args.explain is not None:
        print(explanation(args.explain))
        return 0
    if args.config is None:
        raise UserError("vcppo config needs a configuration file, such as configs/demo/sft.yaml, or --explain")
    overrides = [*local_overrides(args.cluster), *args.overrides]
    print(dump_config(load_config(args.config, overrides, profiles=profile_files(args.cluster))), end="")
    return 0


def explanation(prefix: str) -> str:
    """Every key below ``prefix``: name, type, default, meaning, section by section."""
    from megatron_vcppo.config.keys import all_keys, all_sections, nearest_key
    from megatron_vcppo.errors import UserError

    lines: list[str] = []
    section = None
    for key in all_keys().values():
        if prefix and key.name != prefix and not key.name.startswith(f"{prefix}."):
            continue
        parent = key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            if parent:
                lines += ["", f"[{parent}] {' '.join(all_sections()[parent].split())}"]
        default = "required" if key.default == "???" else f"default {json.dumps(key.default, ensure_ascii=False)}"
        lines.append(f"  {key.name}: {key.type_text} ({default})")
        lines += textwrap.wrap(key.doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not lines:
        raise UserError(f"no configuration key starts with {prefix}; did you mean {nearest_key(prefix)}?")
    return "\n".join(lines).strip("\n")
