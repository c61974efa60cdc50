"""Runs a chain of tiny stages on this machine, or resumes it: ``python -m tools.benchmarks._kill_chain RUN``."""

import sys
from pathlib import Path

from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.run import log
from megatron_vcppo.run.config_file import open_run
from tools.benchmarks._tiny_chains import TINY

if __name__ == "__main__":
    log.configure("controller")
    run, config = open_run(Path(sys.argv[1]))
    sys.exit(run_chain(run, config, [*config.stages], TINY))
