"""One task of `vcppo doctor`'s collective: all GPUs (without GPUs: one process) of all nodes sum one tensor, timed."""

import json
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.network import listen, node_environment, node_network
from megatron_vcppo.run.files import write_text
from megatron_vcppo.slurm.marked_lines import ANSWER

SYS = Path("/sys/class")
NVLINK_GB_PER_S = {"B300": 900, "B200": 900, "H200": 450, "H100": 450, "H800": 200, "A100": 300, "A800": 200}
"""One direction, all NVLinks of a GPU of the SXM kind together; PCIe cards of these names have less."""
GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 24
"""Of the tensor of each rank: on GPUs as large as the gradients of a big layer group, else little work for a CPU."""
REPEATS = 5
TIMEOUT = timedelta(seconds=120)
POLL_S = 0.05


def link_rate(interface: str, gpu_name: str, sys: Path = SYS) -> tuple[float | None, str]:
    """GB/s of one direction and what they are of: all active InfiniBand (RoCE) ports, else the interface.

    A job on one node has the loopback interface: then the NVLinks of the GPU count. None if nothing is known.
    """
    if interface == "lo":
        known = next((name for name in NVLINK_GB_PER_S if name in gpu_name and "PCIe" not in gpu_name), None)
        return (NVLINK_GB_PER_S[known], f"NVLink of {gpu_name}") if known else (None, "")
    ports = [port for port in sys.glob("infiniband/*/ports/*") if "ACTIVE" in read(port / "state")]
    rates = [float(found[1]) for port in ports if (found := re.match(r"([\d.]+) Gb/sec", read(port / "rate")))]
    if rates:
        return sum(rates) / 8, f"{len(rates)} InfiniBand ports, {sum(rates):g} Gb/s together"
    speed = read(sys / "net" / interface / "speed")
    return (int(speed) / 8000, f"{interface}, {speed} Mb/s") if speed.isdigit() else (None, "")


def read(path: Path) -> str:
    """The text of a file of the kernel; empty if it has none (a link that is down gives an error)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def main() -> int:
    """``python -m megatron_vcppo.slurm.allreduce_probe CONFIG``, readable by all tasks; a marked JSON line per task."""
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
    print(ANSWER + json.dumps(found), flush=True)
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
