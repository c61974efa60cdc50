"""One task of `vcppo doctor`'s test job: joins a process group over all nodes, sums a tensor, says what it found."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path


def main() -> int:
    """``python -m slurm.allreduce_probe FOLDER``: FOLDER must be shared; one JSON line per task on standard output."""
    import torch
    import torch.distributed as dist

    rank, ranks, local = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
    node = os.environ["SLURMD_NODENAME"]
    gpus = torch.cuda.device_count()
    backend = "nccl" if gpus else "gloo"
    device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    store = Path(sys.argv[1]).absolute() / "rendezvous"
    started = time.monotonic()
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    total = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(total)
    first_s = time.monotonic() - started
    began = time.monotonic()
    for _ in range(5):
        dist.all_reduce(total)
    if gpus:
        torch.cuda.synchronize()
    gib = total.numel() * total.element_size() / 2**30
    rate = 5 * gib / (time.monotonic() - began)
    found = {"node": node, "rank": rank, "torch": torch.__version__, "gpus": gpus, "backend": backend}
    print(json.dumps({**found, "first_s": round(first_s, 2), "gib_per_s": round(rate, 2)}), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
