#!/usr/bin/env python
"""Measure speed: ``python tools/bench.py NAME [options]`` prints one JSON line per case; without NAME, all names.

``--keep`` stores the cases in tools/benchmarks/baselines.json, or another file (``--keep=FILE``). ``--compare`` prints
below each case the ratios of its numbers to those that were stored for the same NAME and options.

A benchmark is a module tools/benchmarks/NAME.py with ``add_arguments(parser)`` and ``run(args)``, which yields one
dict per case. Modules whose name begins with "_" are shared helpers.
"""

import argparse
import ast
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(words: list[str]) -> None:
    """Parse the benchmark's own options, run it, print its cases as they come."""
    sys.path.insert(0, str(ROOT))
    from tools.benchmarks._baselines import FILE, keep_baseline, ratios, read_baselines

    summaries = {path.stem: _summary(path) for path in sorted((ROOT / "tools" / "benchmarks").glob("[!_]*.py"))}
    parser = argparse.ArgumentParser(description="Measure the speed of one part; one JSON line per case.")
    benchmarks = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    # Only the chosen module is imported: others may need what this machine lacks.
    chosen = next((word for word in words if word in summaries), None)
    for name, summary in summaries.items():
        benchmark_parser = benchmarks.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(f"tools.benchmarks.{name}")
            module.add_arguments(benchmark_parser)
            for option, text in (("--keep", "store the cases as a baseline"), ("--compare", "print ratios to it")):
                benchmark_parser.add_argument(option, nargs="?", type=Path, const=FILE, metavar="FILE", help=text)
    args = parser.parse_args(words)
    command = " ".join(word for word in words if not word.startswith(("--keep", "--compare")))
    before = read_baselines(args.compare).get(command, {}).get("cases", []) if args.compare else []
    if args.compare and not before:
        raise SystemExit(f"{args.compare} has no cases of: {command}; --keep stores them")
    cases = []
    for number, case in enumerate(module.run(args)):
        print(json.dumps(case), flush=True)
        if number < len(before):
            print(json.dumps({"over_baseline": ratios(case, before[number])}), flush=True)
        cases.append(case)
    if args.keep:
        keep_baseline(args.keep, command, cases)


def _summary(path: Path) -> str:
    """First line of the module's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
