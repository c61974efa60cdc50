"""vcppo init: a first configuration."""

import argparse
import re
import shlex
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "init",
        description="Write a commented configuration for a model, data and a cluster; asks nothing, starts nothing. "
        "Data with responses gives SFT, problems with answers give VC-PPO; the parallel layout is the cheapest that "
        "fits the cluster's GPUs by the memory plan.",
    )
    parser.add_argument("config", type=Path, metavar="FILE", help="the YAML file to write")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face folder of the model")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="training data: a file or another source")
    parser.add_argument("--test", metavar="SOURCE", help="held-out data of the same form")
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file once it loads as a configuration."""
    from megatron_vcppo.commands.arguments import print_note
    from megatron_vcppo.config.load import load_config
    from megatron_vcppo.config.value_sources import CONFIGS, profile_files
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.launch.first_config import first_values, render
    from megatron_vcppo.run.files import replacing
    from megatron_vcppo.run.log import printable

    target: Path = args.config
    if target.exists():
        raise UserError(f"{target}: exists already: choose another name, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder for {target.name}")
    profiles = [path.absolute() for path in profile_files(args.cluster)]
    names = [str(path.relative_to(CONFIGS).with_suffix("") if CONFIGS in path.parents else path) for path in profiles]
    with replacing(target, durable=False) as temporary:
        temporary.write_text(render({}, names, "x"), encoding="utf-8")
        cluster = load_config(temporary, complete=False)
        run_name = re.sub(r"[^\w.-]+", "-", target.stem).strip(".-") or "run"
        values = first_values(args.model, args.data, args.test, cluster, f"runs/{run_name}")
        command, quoted = "submit" if profiles else "run", shlex.quote(str(target))
        head = f"Made by vcppo init. vcppo config --explain lists every key.\nStart with: vcppo {command} {quoted}"
        temporary.write_text(render(values, names, head), encoding="utf-8")
        try:
            load_config(temporary, note=print_note)
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), str(target))) from None
    print(printable(f"{target}: {', '.join(values['stages'])}"))
    print(printable(f"check it with: vcppo config {quoted}; start it with: vcppo {command} {quoted}"))
    return 0
