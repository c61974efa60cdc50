"""Training steps of the Megatron actor beside transformers with padding: valid tokens/s, their ratio, utilisation.

Both sides train on the same sequences of mixed lengths, with the same number of cores, step about in turns; a step is
packing or padding, forward, backward, clipping and AdamW. Their losses must agree. Utilisation (MFU) is
model FLOP/s over the device's peak: a table of GPUs (bf16, dense), or on a CPU the speed of a large matrix product.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks._train_sides import Work, serve

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125}
"""bf16 without sparsity, by a part of the device's name; the first that fits counts."""
TIMEOUT_S = 900.0
SHORTEST = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, batch, layout."""
    parser.add_argument("--hf", type=Path, help="folder of a Hugging Face model; default: a random one of these sizes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step")
    parser.add_argument("--median-length", type=int, default=256, help="of a log-normal distribution, in tokens")
    parser.add_argument("--spread", type=float, default=0.9, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--max-length", type=int, default=2048, help="longer ones are cut")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--reference-batch", type=int, default=8, help="sequences that transformers pads together")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU: threads of either side together")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side, after one of warm-up")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per side, then their ratio."""
    with tempfile.TemporaryDirectory(prefix="bench_train_") as name:
        hf = args.hf or _random_model(args, Path(name))
        from megatron_vcppo.mcore.architecture import Architecture

        arch = Architecture.from_hf(hf)
        sequences = _sequences(args, arch.vocab_size)
        ranks = args.tp * args.pp * args.cp * args.dp
        layout = {"tp": args.tp, "pp": args.pp, "cp": args.cp, "dp": args.dp}
        common = {"layout": layout, "tokens_per_microbatch": args.tokens_per_microbatch, "recompute": args.recompute}
        common |= {"hf": hf, "sequences": sequences, "dtype": args.dtype, "reference_batch": args.reference_batch}
        with (
            _started("megatron", Work(threads=max(1, args.cores // ranks), **common), ranks) as ours,
            _started("transformers", Work(threads=args.cores, **common), 1) as theirs,
        ):
            seconds, cpu_seconds, losses = _in_turns({"megatron": ours, "transformers": theirs}, args.rounds)
        assert abs(losses["megatron"] / losses["transformers"] - 1) < (1e-3 if args.dtype == "float32" else 2e-2), (
            losses
        )
        num_tokens, flops = sum(map(len, sequences)), arch.training_flops(map(len, sequences))
        device, peak = _peak_flops(args)
        facts = {"device": device, "parameters": arch.parameter_count(), "sequences": len(sequences)}
        facts |= {"tokens": num_tokens, "longest": max(map(len, sequences))}
        for side, devices in (("megatron", ranks), ("transformers", 1)):
            used = peak and peak * (devices if device != "cpu" else 1)
            yield {
                "case": side,
                **(layout if side == "megatron" else {"padded_batch": args.reference_batch}),
                **facts,
                "step_s": round(min(seconds[side]), 3),
                "step_median_s": round(statistics.median(seconds[side]), 3),
                "step_cpu_s": round(min(cpu_seconds[side]), 3),
                "tokens_per_s": round(num_tokens / min(seconds[side])),
                "gflops_per_s": round(flops / min(seconds[side]) / 1e9, 1),
                "mfu": round(flops / min(seconds[side]) / used, 3) if used else None,
            }
        both = [theirs / ours for ours, theirs in zip(seconds["megatron"], seconds["transformers"], strict=True)]
        yield {
            "case": "ratio",
            "of_best": round(min(seconds["transformers"]) / min(seconds["megatron"]), 2),
            "median_of_rounds": round(statistics.median(both), 2),
            "of_cpu_time": round(min(cpu_seconds["transformers"]) / min(cpu_seconds["megatron"]), 2),
            "loss": losses,
        }


def _random_model(args: argparse.Namespace, folder: Path) -> Path:
    from tests.helpers.tiny_models import save_tiny_model

    heads = max(2, args.hidden // 64)
    return save_tiny_model(
        folder / "hf",
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=args.vocab,
        max_position_embeddings=args.max_length,
    )


def _sequences(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(args.median_length), args.spread, args.sequences))
    lengths = lengths.astype(int).clip(SHORTEST, args.max_length)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


@contextmanager
def _started(side: str, work: Work, num_processes: int) -> Iterator[list[Connection]]:
    """A side's processes, ready to step; killed at the end."""
    from tests.helpers.distributed import free_port

    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    port = str(free_port())
    # Read when torch is imported, which a spawned process does first of all.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(work.threads)
    try:
        for rank in range(num_processes):
            here, there = context.Pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=serve, args=(there, side, work, place), daemon=True)
            process.start()
            there.close()
            connections.append(here)
            processes.append(process)
        _receive(side, connections)
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def _in_turns(
    sides: dict[str, list[Connection]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Of each side: seconds and processor seconds (all its processes) of every timed step, and the first loss."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for side, connections in sides.items():
            began = time.perf_counter()
            for connection in connections:
                connection.send(True)
            results = _receive(side, connections)
            if number:
                seconds[side].append(time.perf_counter() - began)
                cpu_seconds[side].append(sum(cpu for _, cpu in results))
            else:
                losses[side] = round(results[0][0], 4)
    return seconds, cpu_seconds, losses


def _receive(side: str, connections: list[Connection]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_S
    results = []
    for rank, connection in enumerate(connections):
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} of {side} has not answered for {TIMEOUT_S:.0f} s")
        results.append(connection.recv())
    return results


def _peak_flops(args: argparse.Namespace) -> tuple[str, float | None]:
    """Name and peak FLOP/s of a device; of all cores together on a CPU, by its best of several matrix products."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
        return name, peak and peak * 1e12
    torch.set_num_threads(args.cores)
    size = 1536
    a, b = torch.randn(2, size, size, dtype=getattr(torch, args.dtype))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return "cpu", 2 * size**3 / min(times)
