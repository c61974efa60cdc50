"""Measure speed: ``python tools/bench.py NAME [options]`` prints one JSON line per case; without NAME, all names.

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


def main() -> None:
    """Parse the benchmark's own options, run it, print its cases as they come."""
    sys.path.insert(0, str(ROOT))
    summaries = {path.stem: _summary(path) for path in sorted((ROOT / "tools" / "benchmarks").glob("[!_]*.py"))}
    parser = argparse.ArgumentParser(description="Measure the speed of one part; one JSON line per case.")
    benchmarks = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    # Only the chosen module is imported: others may need what this machine lacks.
    chosen = next((word for word in sys.argv[1:] if word in summaries), None)
    for name, summary in summaries.items():
        benchmark_parser = benchmarks.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(f"tools.benchmarks.{name}")
            module.add_arguments(benchmark_parser)
    args = parser.parse_args()
    for case in module.run(args):
        print(json.dumps(case), flush=True)


def _summary(path: Path) -> str:
    """First line of the module's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


if __name__ == "__main__":
    main()
