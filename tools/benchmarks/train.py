"""Training steps of the Megatron actor and of transformers with padding: valid tokens/s, their ratio, utilization.

Both sides train on the same sequences of mixed lengths, with the same number of cores, in turns; a step is packing or
padding, forward, backward, clipping and AdamW. Their losses must agree. Utilization (MFU) is model FLOP/s over the
device's peak: a table of GPUs (bf16, dense), or on a CPU the speed of a large matrix product.
``--sides megatron`` needs neither transformers nor a file: the weights are Megatron's random ones. On a GPU it also
compares the peak memory with the plan of launch/memory_plan.py.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.device_speed import matrix_flops, peak_tflops
from tools.benchmarks._train_sides import SIDES, Answer, Work, serve

TIMEOUT_S = 900.0
SHORTEST = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, batch, layout."""
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--hf", type=Path, help="folder of a Hugging Face model; default: a random one of these sizes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step")
    parser.add_argument("--median-length", type=int, default=256, help="of a log-normal distribution, in tokens")
    parser.add_argument("--spread", type=float, default=0.9, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--max-length", type=int, default=2048, help="longer ones are truncated")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--reference-batch", type=int, default=8, help="sequences that transformers pads together")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument(
        "--own-layers", action="store_true", help="not Transformer Engine's, also where it is installed"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of section model, as in fp8=hybrid"
    )
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU: threads of either side together")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side, after one of warm-up")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per side, then their ratio."""
    with tempfile.TemporaryDirectory(prefix="bench_train_") as name:
        hf = args.hf or (_random_model(args, Path(name)) if "transformers" in args.sides else None)
        arch = Architecture.from_hf(hf) if hf else Architecture.from_config({"model_type": "qwen2", **_sizes(args)})
        sequences = _sequences(args, arch.vocab_size)
        ranks = args.tp * args.pp * args.cp * args.dp
        layout = {"tp": args.tp, "pp": args.pp, "cp": args.cp, "dp": args.dp}
        model = {"dtype": args.dtype, **dict(pair.split("=", 1) for pair in args.set)}
        work = Work(
            hf=hf, arch=arch, sequences=sequences, model=model, threads=max(1, args.cores // ranks), layout=layout,
            tokens_per_microbatch=args.tokens_per_microbatch, recompute=args.recompute, own_layers=args.own_layers,
            learning_rate=args.lr, reference_batch=args.reference_batch,
        )  # fmt: skip
        with ExitStack() as stack:
            processes = {}
            for side in args.sides:
                threads, count = (work.threads, ranks) if side == "megatron" else (args.cores, 1)
                processes[side] = stack.enter_context(_started(side, replace(work, threads=threads), count))
            seconds, answers = _in_turns(processes, args.rounds)
        device, peak = _peak_flops(args)
        facts: dict[str, Any] = {"device": device, "parameters": arch.parameter_count(), "sequences": len(sequences)}
        facts |= {"tokens": sum(map(len, sequences)), "longest": max(map(len, sequences))}
        for side in args.sides:
            devices = ranks if side == "megatron" and device != "cpu" else 1
            shape = layout if side == "megatron" else {"padded_batch": args.reference_batch}
            speed = _speed(facts["tokens"], arch.training_flops(map(len, sequences)), seconds[side])
            yield {
                **{"case": side, **shape, **model, **facts, **speed},
                "step_cpu_s": round(min(sum(a.cpu_s for a in step) for step in answers[side][1:]), 3),
                "mfu": round(1e9 * speed["gflops_per_s"] / (peak * devices), 3) if peak else None,
                "losses": [round(step[0].loss, 4) for step in answers[side]],
                "peak_memory_gib": _largest([a.peak_gib for step in answers[side] for a in step]),
                "planned_memory_gib": answers[side][0][0].planned_gib,
            }
        if len(args.sides) == 2:
            yield _ratio(args, seconds, answers)


def _speed(num_tokens: int, flops: int, seconds: list[float]) -> dict[str, float]:
    return {
        "step_s": round(min(seconds), 3),
        "step_median_s": round(statistics.median(seconds), 3),
        "tokens_per_s": round(num_tokens / min(seconds)),
        "gflops_per_s": round(flops / min(seconds) / 1e9, 1),
    }


def _largest(sizes: list[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return max(known) if known else None


def _ratio(
    args: argparse.Namespace, seconds: dict[str, list[float]], answers: dict[str, list[list[Answer]]]
) -> dict[str, Any]:
    """Transformers' time over ours; AssertionError if the losses of the first step differ."""
    losses = {side: answers[side][0][0].loss for side in SIDES}
    tolerance = 1e-3 if args.dtype == "float32" else 2e-2
    assert abs(losses["megatron"] / losses["transformers"] - 1) < tolerance, losses
    cpu_s = {side: min(sum(a.cpu_s for a in step) for step in answers[side][1:]) for side in SIDES}
    both = [theirs / ours for ours, theirs in zip(seconds["megatron"], seconds["transformers"], strict=True)]
    return {
        "case": "ratio",
        "of_best": round(min(seconds["transformers"]) / min(seconds["megatron"]), 2),
        "median_of_rounds": round(statistics.median(both), 2),
        "of_cpu_time": round(cpu_s["transformers"] / cpu_s["megatron"], 2),
    }


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    """As config.json names them: grouped heads, a feed-forward layer of 2.75 times the hidden size."""
    heads = max(2, args.hidden // args.head_dim)
    return {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": args.vocab,
        "max_position_embeddings": args.max_length,
    }


def _random_model(args: argparse.Namespace, folder: Path) -> Path:
    from tools.benchmarks._tiny_models import save_tiny_model

    return save_tiny_model(folder / "hf", **_sizes(args))


def _sequences(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    # Rounding may leave exp(log(4096)) below 4096.
    lengths = np.exp(generator.normal(np.log(args.median_length), args.spread, args.sequences)) * (1 + 1e-12)
    lengths = lengths.astype(int).clip(SHORTEST, args.max_length)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


@contextmanager
def _started(side: str, work: Work, num_processes: int) -> Iterator[list[Connection]]:
    """A side's processes, ready to step; killed at the end."""
    from megatron_vcppo.run.processes import free_port

    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    port = str(free_port("127.0.0.1"))
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
) -> tuple[dict[str, list[float]], dict[str, list[list[Answer]]]]:
    """Of each side: seconds of every timed step, and the answers of its processes after every step, warm-up first."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, list[list[Answer]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, connections in sides.items():
            began = time.perf_counter()
            for connection in connections:
                connection.send(True)
            answers[side].append(_receive(side, connections))
            if number:
                seconds[side].append(time.perf_counter() - began)
    return seconds, answers


def _receive(side: str, connections: list[Connection]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_S
    results = []
    for rank, connection in enumerate(connections):
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} of {side} has not answered for {TIMEOUT_S:.0f} s")
        try:
            results.append(connection.recv())
        except EOFError:
            raise RuntimeError(f"rank {rank} of {side} ended; its output shows why") from None
    return results


def _peak_flops(args: argparse.Namespace) -> tuple[str, float | None]:
    """Name and peak FLOP/s of a device; of all cores together on a CPU, by its best of several matrix products."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = peak_tflops(name)
        return name, peak and peak * 1e12
    torch.set_num_threads(args.cores)
    return "cpu", matrix_flops(1536, getattr(torch, args.dtype))
