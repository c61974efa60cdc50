"""A stage small enough for fault tests: real gloo ranks, real checkpoints, the same contract as every stage.

Its state is the list of iterations trained so far, the sum of an all-reduce per iteration, and weights, each bit of
which depends on all iterations; all are in the checkpoint, so a lost, repeated or torn iteration shows in the end. With
TINY_WRITE_SECONDS a thread takes that long to write a checkpoint while training continues, and with TINY_VERIFIER=1
rank 0 scores an answer per iteration in a verifier's process. With TINY_GREED_MB the last rank takes that much memory
in iteration 3; with TINY_HANG it hangs there, unless there is a file of that name, which it leaves; a collective waits
TINY_PATIENCE_S.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.network import node_environment
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.manifest import FORMAT, MANIFEST_NAME, file_record, verify_manifest, write_manifest

stop_requested = False


def request_stop(*_: object) -> None:
    global stop_requested
    stop_requested = True


def load_newest(checkpoints: Path) -> dict[str, Any]:
    for folder in sorted(checkpoints.glob("iter_*"), reverse=True):
        try:
            verify_manifest(folder)
            state = json.loads((folder / "state.json").read_text())
            return state | {"weights": np.fromfile(folder / "weights.bin")}
        except UserError as error:
            print(f"checkpoint skipped: {error}", flush=True)
    weights = np.random.default_rng(1).standard_normal(int(os.environ.get("TINY_BYTES", "1000")) // 8)
    return {"trained": [], "total": 0.0, "weights": weights}


def save(checkpoints: Path, state: dict[str, Any]) -> None:
    final = checkpoints / f"iter_{len(state['trained']):07d}"
    temporary = checkpoints / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "state.json").write_text(json.dumps({key: state[key] for key in ("trained", "total")}))
    (temporary / "weights.bin").write_bytes(state["weights"].tobytes())  # numpy's tofile does not name a full disk
    time.sleep(float(os.environ.get("TINY_WRITE_SECONDS", "0")))
    write_manifest(temporary, {"iteration": len(state["trained"])})
    temporary.rename(final)


def hang_once(mark: str | None) -> None:
    """Stop this process as if it hung, the first time."""
    if mark and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGSTOP)


class Writer:
    """One background save at a time; a failed one fails the rank at the next."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    def start(self, state: dict[str, Any]) -> None:
        self.finish()
        copy = {**state, "trained": [*state["trained"]], "weights": state["weights"].copy()}
        self.thread = threading.Thread(target=self._write, args=(copy,))
        self.thread.start()

    def finish(self) -> None:
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error

    def _write(self, state: dict[str, Any]) -> None:
        try:
            save(self.checkpoints, state)
        except Exception as error:
            self.error = error


def answer_to(scorer: Any, iteration: int) -> str:
    """The verdict on a right answer, from a verifier's process."""
    from megatron_vcppo.records import Prompt, Rollout

    prompt = Prompt(f"p:{iteration}", (1,), "", str(iteration), "math")
    text = f"\\boxed{{{iteration}}}"
    (scored,) = scorer.score([Rollout(prompt, 0, iteration, (2,), text, (-1.0,), "stop", 0)])
    return str(scored.verdict)


def main() -> int:
    signal.signal(signal.SIGUSR2, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    stage, config = sys.argv[1], load_config(sys.argv[3])
    if config.sft.train == "bad":
        print("vcppo: data.jsonl:7: sample has no response", file=sys.stderr, flush=True)
        return 2
    os.environ.update(node_environment(config.cluster))
    import torch.distributed as dist

    from megatron_vcppo.mcore.ranks_store import ranks_store

    folder = Path(config.run.dir) / stage
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=60)
    store, patience = (
        ranks_store(rank, ranks, timeout),
        timedelta(seconds=float(os.environ.get("TINY_PATIENCE_S", "1800"))),
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    with ExitStack() as stack:
        scorer = None
        if rank == 0 and os.environ.get("TINY_VERIFIER") == "1":
            from megatron_vcppo.rewards.scorer import Scorer

            scorer = stack.enter_context(Scorer(num_workers=1))
        return train(config, folder, rank, ranks, scorer)


def train(config: Config, folder: Path, rank: int, ranks: int, scorer: Any) -> int:
    """Every iteration that is left; returns the exit code."""
    import torch
    import torch.distributed as dist

    checkpoints = folder / "checkpoints"
    writer, state = Writer(checkpoints), load_newest(checkpoints)
    assert config.sft.steps
    print(f"rank {rank}/{ranks} starts after iteration {len(state['trained'])}", flush=True)
    while len(state["trained"]) < config.sft.steps:
        time.sleep(float(os.environ.get("TINY_SECONDS", "0.05")))
        iteration = len(state["trained"]) + 1
        if iteration == 3 and rank == ranks - 1:
            hang_once(os.environ.get("TINY_HANG"))
            _ = [b"x" * (1 << 20) for _ in range(int(os.environ.get("TINY_GREED_MB", "0")))]
        both = torch.tensor([float(iteration), float(stop_requested)])
        dist.all_reduce(both)
        state["trained"].append(iteration)
        state["total"] += both[0].item() / ranks
        weights = torch.from_numpy(np.sin(state["weights"] * iteration) / (1 + rank))
        dist.all_reduce(weights)
        state["weights"] = weights.numpy()
        stopping = both[1].item() > 0
        if rank == 0:
            record = {
                "iteration": iteration,
                "timestamp": time.time(),
                "total_iterations": config.sft.steps,
                "loss": 1 / iteration,
            }
            if scorer is not None and (verdict := answer_to(scorer, iteration)) != "correct":
                print(f"iteration {iteration}: verdict {verdict}", flush=True)
            if stopping or iteration % config.sft.checkpoint.save_every == 0 or iteration == config.sft.steps:
                writer.start(state)
            if stopping or iteration == config.sft.steps or "TINY_WRITE_SECONDS" not in os.environ:
                writer.finish()
            with (folder / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps(record) + "\n")
        dist.barrier()
        if stopping and iteration < config.sft.steps:
            return 75
    if rank == 0:
        (folder / "result.json").write_text(json.dumps({key: state[key] for key in ("trained", "total")}))
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
