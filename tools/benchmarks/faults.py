"""What each fault costs a chain of two tiny stages on a real Slurm: minutes and repeated iterations."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm.devcluster import DevCluster
from tests.slurm.faults import FAULTS, chain, suffer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--only picks faults."""
    parser.add_argument("--only", nargs="*", default=list(FAULTS)[1:], help="names of faults; default: all")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per fault; ``lost_minutes`` is against the same chain without a fault, which runs first."""
    folder = Path(tempfile.mkdtemp(prefix="vcppo_faults_"))
    cluster = DevCluster(folder / "slurm", tied=True)
    folder.chmod(0o755)
    cluster.up(nodes=4)
    os.environ |= cluster.environment
    try:
        plain = None
        for name in ["none", *args.only]:
            run_folder, config = chain(folder / name.replace(" ", "_"))
            cost = suffer(cluster, run_folder, config, FAULTS[name], 240)
            plain = plain or cost["wall_s"]
            yield {"fault": name, "lost_minutes": round((cost["wall_s"] - plain) / 60, 2), **cost}
    finally:
        cluster.down()
