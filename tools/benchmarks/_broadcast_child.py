"""Child of the weight-sync benchmark: receives bare broadcasts, one series per round, and does nothing else."""

import sys

import torch
import torch.distributed as dist

from megatron_vcppo.rollout.group import join_group, reach_store


def main() -> None:
    """Arguments: port, rank, world size, bytes of a bucket, number of buckets, rounds."""
    port, rank, size, bucket_bytes, num_buckets, rounds = map(int, sys.argv[1:7])
    store = reach_store("127.0.0.1", port, 120.0)
    group = join_group(store, rank, size, "gloo", torch.device("cpu"), 600.0, "127.0.0.1")
    bucket = torch.empty(bucket_bytes, dtype=torch.uint8)
    for _ in range(rounds):
        for _ in range(num_buckets):
            group.wait(group.broadcast(bucket))
        acknowledge(group)


def acknowledge(group: object) -> None:
    """All ranks have everything."""
    group.process_group.barrier(dist.BarrierOptions()).wait()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
