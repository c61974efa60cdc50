"""One task of `vcppo doctor`'s collective: all GPUs (without GPUs: one process) of all nodes sum one tensor, timed."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.network import listen, node_network
from megatron_vcppo.config.node_environment import node_environment
from megatron_vcppo.run.files import write_text
from megatron_vcppo.slurm.link_rate import link_rate

GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 24
"""Of the tensor of each rank: on GPUs as large as the gradients of a big layer group, else little work for a CPU."""
REPEATS = 5
TIMEOUT = timedelta(seconds=120)
POLL_S = 0.05


def main() -> int:
    """``python -m megatron_vcppo.slurm.allreduce_probe CONFIG``, readable by all tasks; a JSON line per task."""
    config_file = Path(sys.argv[1])
    cluster = load_config(config_file, complete=False).cluster
    os.environ.update(node_environment(cluster))  # before torch is imported
    import torch
    import torch.distributed as dist

    rank, ranks, local = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
    network = node_network(cluster)
    gpus = torch.cuda.device_count()
    backend, num_bytes = ("nccl", GPU_BYTES) if gpus else ("gloo", CPU_BYTES)
    device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    started = time.monotonic()
    store = meet(config_file.with_name("meeting_point"), network.address, rank, ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    total = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(total)
    if total[-1].item() != ranks:
        raise RuntimeError(f"the all-reduce over {ranks} ranks gave {total[-1].item()}")
    first_s, began = time.monotonic() - started, time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(total)
    if gpus:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - began) / REPEATS
    rate, links = link_rate(network.interface, torch.cuda.get_device_name(device) if gpus else "")
    found = {
        "node": os.environ["SLURMD_NODENAME"],
        "rank": rank,
        "gpus": gpus,
        "backend": backend,
        "address": network.address,
        "interface": network.interface,
        "first_s": round(first_s, 2),
        "bus_gb_per_s": round(num_bytes / seconds * 2 * (ranks - 1) / ranks / 1e9, 2),
        "link_gb_per_s": rate,
        "links": links,
    }
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    return 0


def meet(file: Path, address: str, rank: int, ranks: int):  # type: ignore[no-untyped-def]  # torch is imported late
    """The ranks' store: served by rank 0 on its node's address, which the others read from a shared file."""
    from torch.distributed import TCPStore

    if rank == 0:
        listener = listen(address)
        port = listener.getsockname()[1]
        write_text(file, f"{address} {port}")
        fd = listener.detach()  # the store closes it
        return TCPStore(address, port, ranks, is_master=True, timeout=TIMEOUT, master_listen_fd=fd)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file}: rank 0 wrote no meeting point in {TIMEOUT.total_seconds():g} s")
        time.sleep(POLL_S)
    host, port = file.read_text().split()
    return TCPStore(host, int(port), ranks, is_master=False, timeout=TIMEOUT)


if __name__ == "__main__":
    sys.exit(main())
