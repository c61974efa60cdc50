"""A stage small enough for fault tests: real gloo ranks, real checkpoints, the same contract as every stage.

Its state is the list of iterations trained so far and the sum of an all-reduce per iteration; both are in the
checkpoint, so a lost, repeated or torn iteration shows in the final state.
"""

import json
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.network import node_environment
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.manifest import FORMAT, MANIFEST_NAME, file_record, verify_manifest, write_manifest

stop_requested = False


def request_stop(*_: object) -> None:
    global stop_requested
    stop_requested = True


def load_newest(checkpoints: Path) -> dict:
    for folder in sorted(checkpoints.glob("iter_*"), reverse=True):
        try:
            verify_manifest(folder)
            return json.loads((folder / "state.json").read_text())
        except UserError as error:
            print(f"checkpoint skipped: {error}", flush=True)
    return {"trained": [], "total": 0.0}


def save(checkpoints: Path, state: dict) -> None:
    final = checkpoints / f"iter_{len(state['trained']):07d}"
    temporary = checkpoints / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "state.json").write_text(json.dumps(state))
    (temporary / "weights.bin").write_bytes(os.urandom(int(os.environ.get("TINY_BYTES", "1000"))))
    write_manifest(temporary, {"iteration": len(state["trained"])})
    temporary.rename(final)


def main() -> int:
    signal.signal(signal.SIGUSR2, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    stage, config = sys.argv[1], load_config(sys.argv[3])
    if config.sft.train == "bad":
        print("vcppo: data.jsonl:7: sample has no response", file=sys.stderr, flush=True)
        return 2
    os.environ.update(node_environment(config.cluster))
    import torch
    import torch.distributed as dist

    from megatron_vcppo.mcore.ranks_store import ranks_store

    folder = Path(config.run.dir) / stage
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    assert config.sft.steps
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=60)
    dist.init_process_group("gloo", store=ranks_store(rank, ranks, timeout), rank=rank, world_size=ranks)
    state = load_newest(checkpoints)
    print(f"rank {rank}/{ranks} starts after iteration {len(state['trained'])}", flush=True)
    while len(state["trained"]) < config.sft.steps:
        time.sleep(float(os.environ.get("TINY_SECONDS", "0.05")))
        iteration = len(state["trained"]) + 1
        both = torch.tensor([float(iteration), float(stop_requested)])
        dist.all_reduce(both)
        state["trained"].append(iteration)
        state["total"] += both[0].item() / ranks
        stopping = both[1].item() > 0
        if rank == 0:
            record = {
                "iteration": iteration,
                "timestamp": time.time(),
                "total_iterations": config.sft.steps,
                "loss": 1 / iteration,
            }
            if stopping or iteration % config.sft.checkpoint.save_every == 0 or iteration == config.sft.steps:
                save(checkpoints, state)
            with (folder / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps(record) + "\n")
        dist.barrier()
        if stopping and iteration < config.sft.steps:
            return 75
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(state))
        finish(folder)
    return 0


def finish(folder: Path) -> None:
    """Mark the stage done: a manifest of its newest checkpoint, written last."""
    newest = max((folder / "checkpoints").glob("iter_*"))
    files = {path.relative_to(folder).as_posix(): path for path in newest.iterdir()}
    content = {"format": FORMAT, "meta": {}, "files": {name: file_record(path) for name, path in files.items()}}
    temporary = folder / ".manifest.tmp"
    temporary.write_text(json.dumps(content))
    temporary.rename(folder / MANIFEST_NAME)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
