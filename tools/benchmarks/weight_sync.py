"""A push of a large model by 1, 2, 4 senders into 1, 2, 4 engines, compared with the senders' links.

The push is the whole cycle: pause, connect, send, repack in the engines, reset of caches, resume. ``--link-gbit`` (as
root) gives every sender a link of that speed, in a separate network namespace: what leaves its address is held to that
rate; engines' links are not limited. ``of_links``: bytes of the model per second, in all engines at once, over the sum
of the links. Without it all senders and engines share this machine's memory and cores, and the figure is theirs.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.weight_sync.push_plan import role_in_stage
from megatron_vcppo.weight_sync.sync import WeightSync
from megatron_vcppo.weight_sync.transport import DiskTransport, NetworkTransport, Transport
from tools.benchmarks._ranks import run_ranks
from tools.benchmarks._rollout_node import RolloutNode, save_policy

WARM_UP = 2
"""Rounds that are not counted: the first pushes connect, and touch memory that the engine then keeps."""
TIMEOUT_S = 600.0
ENGINES = "127.0.9.1"
"""Where engines listen. Higher than the senders' addresses: of two gloo ranks the one with the higher address connects,
so that what a sender sends comes from its own address."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--link-gbit", type=float, help="Gbit/s of each sender's link; needs root and tc")
    parser.add_argument("--transport", choices=("network", "disk"), default="network")
    parser.add_argument("--verify", action="store_true", help="compare checksums")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per number of engines and of senders."""
    if args.link_gbit:
        limit_links(args.link_gbit, max(args.senders))
    with tempfile.TemporaryDirectory(prefix="bench_weight_sync_") as name:
        folder = Path(name)
        sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers,
                 "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 128}  # fmt: skip
        model = save_policy(folder / "model", **sizes)
        for engines in args.engines:
            with RolloutNode(
                folder / f"node_{engines}", model, {"engine": {"per_node": engines}}, address=ENGINES
            ) as node:
                node.wait(engines)
                for turn, senders in enumerate(args.senders):
                    yield measure(args, node, model, engines, senders, turn * 1000)


def address_of(sender: int) -> str:
    """Where a sender, counted from 1, listens, and what its link is known by."""
    return f"127.0.1.{sender}"


def limit_links(gbit: float, senders: int) -> None:
    """Move this process and its later children to a network in which each sender's address has a link of that speed."""
    clone_newnet = 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(clone_newnet):
        raise SystemExit(f"--link-gbit: no network namespace: {os.strerror(ctypes.get_errno())}; run as root")
    burst = int(gbit * 1e9 / 8 * 0.01)
    commands = ["ip link set lo up", "tc qdisc add dev lo root handle 1: htb"]
    for link in range(1, senders + 1):
        commands += [
            f"tc class add dev lo parent 1: classid 1:{link} htb rate {gbit:g}gbit burst {burst} cburst {burst}",
            f"tc filter add dev lo parent 1: protocol ip u32 match ip src {address_of(link)}/32 flowid 1:{link}",
        ]
    for command in commands:
        subprocess.run(command.split(), check=True)


def measure(
    args: argparse.Namespace, node: RolloutNode, model: Path, engines: int, senders: int, first_version: int
) -> dict[str, Any]:
    """Pushes by so many processes, each of which holds the whole model, as data-parallel ranks do."""
    pushes = run_ranks(
        push,
        senders,
        TIMEOUT_S,
        senders,
        args.rounds + WARM_UP,
        args,
        node.folder,
        node.rendezvous,
        model,
        first_version,
    )[0][WARM_UP:]
    num_bytes = (model / "model.safetensors").stat().st_size
    push_s = statistics.median(seconds for seconds, _ in pushes)
    links = senders * args.link_gbit * 1e9 / 8 if args.link_gbit else None
    return {
        "engines": engines,
        "senders": senders,
        "link_gbit": args.link_gbit,
        "transport": args.transport,
        "verify": args.verify,
        "model_mb": round(num_bytes / 1e6),
        "push_s": round(push_s, 3),
        "pause_s": round(statistics.median(pause_s for _, pause_s in pushes), 3),
        "push_mb_per_s": round(num_bytes / push_s / 1e6),
        "of_links": round(num_bytes / push_s / links, 3) if links else None,
    }


def push(
    rank: int,
    senders: int,
    rounds: int,
    args: argparse.Namespace,
    folder: Path,
    rendezvous: Path,
    model: Path,
    first_version: int,
) -> list[tuple[float, float]]:
    """One sender: (seconds, seconds of the longest pause) of every push."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=senders)
    role = role_in_stage(0, 1, 0, 1, rank, senders, senders)
    weights, bucket_bytes = load_file(model / "model.safetensors"), args.bucket_mib * 2**20
    transport: Transport = DiskTransport(folder / "weights", bucket_bytes, role, args.verify)
    if args.transport == "network":
        address, cpu = address_of(1 + rank), torch.device("cpu")
        secret = partial(read_secret, rendezvous / SECRET)
        transport = NetworkTransport(address, cpu, bucket_bytes, TIMEOUT_S, secret, role=role, verify=args.verify)
    sync = WeightSync(WeightSyncConfig(timeout_s=TIMEOUT_S), rendezvous, role, RankGroup(TIMEOUT_S), transport)
    results = [sync.sync(first_version + number, lambda: iter(weights.items())) for number in range(rounds)]
    return [(result.seconds, result.pause_s) for result in results]
