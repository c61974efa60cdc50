"""One task of `vcppo doctor` per node with engines: a random tiny model, and one engine of it until it answers."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_vcppo.config import EngineConfig
from megatron_vcppo.config.load import dump_config, load_config
from megatron_vcppo.errors import DONE, FAILED
from megatron_vcppo.rollout import rendezvous
from megatron_vcppo.run.files import make_private_folder
from megatron_vcppo.run.folder import RunFolder, StageFolder
from megatron_vcppo.run.log import last_lines
from megatron_vcppo.slurm.marked_lines import ANSWER, FINDING

TIMEOUT_S = 420.0
POLL_S = 0.2
STOP_S = 30.0
HEAD_SIZE = 64
"""One that every attention kernel has."""


def main() -> int:
    """``python -m megatron_vcppo.slurm.engine_probe CONFIG``; a marked JSON line: node, seconds to the first answer."""
    from megatron_vcppo.tasks.base_model import write_base_model

    config = load_config(sys.argv[1], complete=False)
    node = os.environ["SLURMD_NODENAME"]
    with tempfile.TemporaryDirectory(prefix="vcppo_engine_probe_") as name:
        folder = Path(name)
        write_base_model(folder / "model", width=2 * HEAD_SIZE, head_size=HEAD_SIZE)
        config.model.hf, config.model.max_length = str(folder / "model"), 512
        config.rollout.engine = EngineConfig(max_num_seqs=8, gpu_memory_utilization=0.5)
        RunFolder(folder).config.write_text(dump_config(config))
        seconds, problem = start(folder)
    if problem:
        print(f"{FINDING}{node}: {problem}", flush=True)
        return FAILED
    print(ANSWER + json.dumps({"node": node, "seconds": round(seconds, 1)}), flush=True)
    return DONE


def start(folder: Path) -> tuple[float, str]:
    """Start the supervisor of one engine, as a job does; seconds until the engine answers, and what went wrong."""
    place, log = make_private_folder(StageFolder(folder).rendezvous), folder / "serve.log"
    arguments = ("--config", str(RunFolder(folder).config), "--rendezvous", str(place), "--node", "0")
    started = time.monotonic()
    with log.open("wb") as output:
        command = (sys.executable, "-m", "megatron_vcppo.rollout.node", *arguments)
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        while not rendezvous.engines(place):
            took = time.monotonic() - started
            restarted = "starting it again" in log.read_text(errors="replace")
            if server.poll() is None and not restarted and took < TIMEOUT_S:
                time.sleep(POLL_S)
                continue
            lines = [line for path in (*place.glob("*.log"), log) for line in last_lines(path, 3)]
            return took, f"an engine with a tiny model does not answer after {took:.0f} s: {'; '.join(lines)[-600:]}"
        return time.monotonic() - started, ""
    finally:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
