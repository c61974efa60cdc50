"""What each fault costs a chain of tiny stages on a real Slurm: minutes and repeated iterations; a table at the end."""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.commands.sweep import text_table
from megatron_vcppo.slurm.devcluster import DevCluster
from tools.benchmarks._faults import FAULTS, suffer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--only picks faults."""
    faults = [name for name in FAULTS if not name.startswith("none")]
    parser.add_argument("--only", nargs="*", choices=faults, default=faults, metavar="FAULT", help="default: all")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per fault; ``lost_minutes`` is against the same chain without a fault, which runs before it."""
    folder = Path(tempfile.mkdtemp(prefix="vcppo_faults_"))
    folder.chmod(0o755)  # munge wants readable parents
    cluster = DevCluster(folder / "slurm", tied=True)
    cluster.up(nodes=4)
    os.environ |= cluster.environment
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name in args.only:
            for needed in (FAULTS[name].plain, name):
                if needed not in rows:
                    rows[needed] = _measure(cluster, folder, needed, rows)
                    yield rows[needed]
    finally:
        cluster.down()
    print(text_table(list(rows.values())), file=sys.stderr)
    if failed := [name for name, row in rows.items() if "failed" in row]:
        sys.exit(f"not survived: {', '.join(failed)}; see {folder}")
    shutil.rmtree(folder)


def _measure(cluster: DevCluster, folder: Path, name: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    fault = FAULTS[name]
    if fault.needs_root and os.getuid() != 0:
        return {"fault": name, "skipped": "needs root"}
    try:
        with fault.chain(folder / re.sub(r"\W+", "_", name)) as (run_folder, config):
            cost = suffer(cluster, run_folder, config, fault)
    except AssertionError as error:
        cluster.command("scancel", "--user", str(os.getuid()))
        return {"fault": name, "failed": str(error)}
    plain_s = rows.get(fault.plain, cost).get("wall_s", cost["wall_s"])
    return {"fault": name, "lost_minutes": round((cost["wall_s"] - plain_s) / 60, 2), **cost}
