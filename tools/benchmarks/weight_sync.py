"""A push of a large model into 1, 2, 4 engines, compared with a bare broadcast of the same bytes over the same backend.

Rounds alternate between the two. The push is the whole cycle: pause, connect, send, repack in the engines, reset of
caches, resume. The bare broadcast goes to as many idle receivers as there are workers, bucket by bucket.

Over one machine's loopback interface a broadcast is as fast as memory, and all else that a push does shares its cores.
``--link-gbit`` (as root) puts a link of that speed in its place, in a separate network namespace.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_vcppo.integers import ceil_div
from megatron_vcppo.rollout.group import Group, join_group, serve_store
from megatron_vcppo.weight_sync.transport import DiskTransport, NetworkTransport, Transport
from tools.benchmarks._broadcast_child import acknowledge
from tools.benchmarks._rollout_node import RolloutNode, save_policy

CHILD = Path(__file__).with_name("_broadcast_child.py")
WARM_UP = 2
"""Rounds that are not counted: the first pushes connect, and touch memory that the engine then keeps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--link-gbit", type=float, help="Gbit/s of the link that both sides share; needs root and tc")
    parser.add_argument("--transport", choices=("network", "disk"), default="network")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per number of engines; ratio: bandwidth of the push over that of the bare broadcast."""
    if args.link_gbit:
        limit_link(args.link_gbit)
    with tempfile.TemporaryDirectory(prefix="bench_weight_sync_") as name:
        folder = Path(name)
        sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers,
                 "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 128}  # fmt: skip
        model = save_policy(folder / "model", **sizes)
        weights = load_file(model / "model.safetensors")
        for count in args.engines:
            with RolloutNode(folder / f"node_{count}", model, {"engine": {"per_node": count}}) as node:
                node.wait(count)
                yield measure(args, node, weights, count)


def limit_link(gbit: float) -> None:
    """Move this process and its later children to a network whose loopback is a link of that speed."""
    clone_newnet = 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(clone_newnet):
        raise SystemExit(f"--link-gbit: no network namespace: {os.strerror(ctypes.get_errno())}; run as root")
    shape = f"tc qdisc add dev lo root tbf rate {gbit:g}gbit burst 8mb latency 200ms"
    for command in ("ip link set lo up", shape):
        subprocess.run(command.split(), check=True)


def measure(
    args: argparse.Namespace, node: RolloutNode, weights: dict[str, torch.Tensor], count: int
) -> dict[str, Any]:
    """Alternate pushes and bare broadcasts."""
    bucket_bytes = args.bucket_mib * 2**20
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    transport: Transport = NetworkTransport("127.0.0.1", torch.device("cpu"), bucket_bytes, 600.0)
    if args.transport == "disk":
        transport = DiskTransport(node.folder / "weights", bucket_bytes)
    sync = node.weight_sync(600.0, transport)
    num_buckets = ceil_div(num_bytes, bucket_bytes)
    pushes, bare = [], []
    with Receivers(count, bucket_bytes, num_buckets, args.rounds + WARM_UP) as receivers:
        for round_number in range(args.rounds + WARM_UP):
            result = sync.sync(round_number, lambda: iter(weights.items()))
            seconds = receivers.broadcast()
            if round_number >= WARM_UP:
                pushes.append(result)
                bare.append(seconds * num_bytes / (num_buckets * bucket_bytes))
    push_s = statistics.median(push.seconds for push in pushes)
    return {
        "engines": count,
        "link_gbit": args.link_gbit,
        "transport": args.transport,
        "model_mb": round(num_bytes / 1e6),
        "push_s": round(push_s, 3),
        "pause_s": round(statistics.median(push.pause_s for push in pushes), 3),
        "push_mb_per_s": round(num_bytes / push_s / 1e6),
        "bare_broadcast_mb_per_s": round(num_bytes / statistics.median(bare) / 1e6),
        "ratio": round(statistics.median(b / p.seconds for b, p in zip(bare, pushes)), 3),
    }


class Receivers:
    """Idle receivers of a bare broadcast, one process each."""

    def __init__(self, count: int, bucket_bytes: int, num_buckets: int, rounds: int) -> None:
        self.num_buckets = num_buckets
        self.bucket = torch.ones(bucket_bytes, dtype=torch.uint8)
        store = serve_store("127.0.0.1", 120.0)
        numbers = [(store.port, rank, count + 1, bucket_bytes, num_buckets, rounds) for rank in range(1, count + 1)]
        root = str(CHILD.parents[2])
        self.children = [
            subprocess.Popen([sys.executable, str(CHILD), *map(str, n)], env={**os.environ, "PYTHONPATH": root})
            for n in numbers
        ]
        self.group: Group = join_group(store, 0, count + 1, "gloo", torch.device("cpu"), 600.0, "127.0.0.1")

    def __enter__(self) -> "Receivers":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.wait(30)

    def broadcast(self) -> float:
        """Seconds until every receiver has every bucket."""
        began = time.perf_counter()
        for _ in range(self.num_buckets):
            self.group.wait(self.group.broadcast(self.bucket))
        acknowledge(self.group)
        return time.perf_counter() - began
