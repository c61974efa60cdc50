"""What only a GPU can show, part by part, on one GPU and without network; one table at the end.

Each part runs in a separate process, for ten minutes at most, names what it needs, and is skipped with the reason
where that is missing. Needed for any: a CUDA build of PyTorch. For most: megatron-core and some small packages, which
``--download DIR`` fetches on a machine with network and ``--wheels DIR`` installs without one. For some: Transformer
Engine, vLLM. ``--device cpu --size tiny`` runs the same code on a CPU, to test the check itself: its verdicts mean
little. Exit code: 0 nothing failed, 1 a check failed, 2 nothing could be checked, or a wrong argument.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tools.gpu_check import wheels
from tools.gpu_check.child import EXTRA_SITE, ChildFailed, call
from tools.gpu_check.parts import PART_TIMEOUT_S, PARTS, Part, reason_to_skip
from tools.gpu_check.rows import Row, skipped, table

LOOK_TIMEOUT_S = 120.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = "\n".join(f"  {part.name:12}{part.summary}\n{'':14}needs {', '.join(part.modules)}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.sh",
        description=__doc__,
        epilog=f"parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install the wheels in DIR into a temporary folder")
    parser.add_argument("--download", type=Path, metavar="DIR", help="fetch these wheels into DIR and end")
    parser.add_argument("--python-version", default="3.12", help="with --download: of the machine with the GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device and rows there, too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - set(names))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; returns the exit code."""
    args = parse(argv)
    if args.download:
        return wheels.download(args.download, args.python_version)
    with ExitStack() as stack:
        if args.wheels:
            site = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check_site_"))
            try:
                wheels.unpack(args.wheels, Path(site))
            except RuntimeError as error:
                print(f"gpu_check: error: {error}", file=sys.stderr)
                return 2
            os.environ[EXTRA_SITE] = site
        needed = sorted({name for part in PARTS for name in part.modules})
        found = call("tools.gpu_check.parts:look", LOOK_TIMEOUT_S, device=args.device, modules=needed)
        rows = []
        for part in [part for part in PARTS if not args.parts or part.name in args.parts]:
            print(f"== {part.name}: {part.summary}", flush=True)
            rows += (new := [replace(row, part=part.name) for row in run_part(part, found, args.device, args.size)])
            print(table(new), flush=True)  # what is known if the whole is interrupted
    print(f"\n{found['device']}\n{table(rows)}", flush=True)
    if args.json:
        write_json(args.json, {"device": found["device"], "rows": [asdict(row) for row in rows]})
    return exit_code(rows)


def run_part(part: Part, found: dict[str, Any], device: str, size: str) -> list[Row]:
    """A part's rows; one row that it was skipped, or that it failed as a whole."""
    if why := reason_to_skip(part, found, device):
        return [skipped(part.summary, why)]
    try:
        return call(part.function, PART_TIMEOUT_S, device=device, target=device, size=size)
    except ChildFailed as error:
        return [Row(part.summary, str(error), "ends without an error", "FAIL")]


def exit_code(rows: list[Row]) -> int:
    """1 if a check failed; 2 if there was none, because a check that shows nothing must not pass for a good one."""
    if any(row.verdict == "FAIL" for row in rows):
        return 1
    if all(row.verdict.startswith("skipped") for row in rows):
        print("gpu_check: nothing was checked", file=sys.stderr)
        return 2
    return 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
