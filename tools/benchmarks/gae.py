"""Decoupled GAE compared with the time to copy its inputs and outputs once, a token loop, and peers' functions.

A peer is named as FILE:FUNCTION; the function takes (rewards, values, mask, gamma, lam_actor, lam_critic).
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_vcppo.algo.gae import decoupled_gae, gae_reference
from tools.benchmarks._measure import keep_freed_memory, peak_bytes, time_together

MASKS = ("full", "tail", "gaps", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/bench.py gae``."""
    parser.add_argument("--shapes", nargs="+", default=["64x2048", "128x8192", "64x32768"], help="BxT")
    parser.add_argument(
        "--masks",
        nargs="+",
        default=["gaps"],
        choices=MASKS,
        help="gaps: responses of half to full length with eight runs of 300 masked tokens; random: 30 %% of all tokens",
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--loop", action="store_true", help="also time a loop over tokens, vectorized over rows")
    parser.add_argument("--peers", nargs="*", default=[], metavar="FILE:FUNCTION")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One case per shape and mask."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    for shape in args.shapes:
        num_rows, num_tokens = map(int, shape.split("x"))
        for mask_kind in args.masks:
            yield {
                "shape": shape,
                "mask": mask_kind,
                "threads": args.threads,
                **_case(num_rows, num_tokens, mask_kind, args),
            }


def _case(num_rows: int, num_tokens: int, mask_kind: str, args: argparse.Namespace) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, num_rows, num_tokens, generator=generator).to(args.device).unbind()
    mask = make_mask(num_rows, num_tokens, mask_kind, generator).to(args.device)
    settings = (1.0, 0.95, 1.0)

    def ours() -> tuple[Tensor, Tensor]:
        gamma, lam_actor, lam_critic = settings
        return decoupled_gae(
            rewards=rewards, values=values, mask=mask, gamma=gamma, lam_actor=lam_actor, lam_critic=lam_critic
        )

    advantages, returns = ours()
    tensors = (rewards, values, mask, advantages, returns)
    functions: dict[str, Callable[[], object]] = {"ours": ours, "copy": lambda: [x.clone() for x in tensors]}
    if args.loop:
        functions["token_loop"] = lambda: token_loop(rewards, values, mask, *settings)
    for peer in args.peers:
        functions[peer.rpartition(":")[2]] = partial(_load(peer), rewards, values, mask, *settings)
    measured = time_together(functions, args.repeats)
    case: dict[str, object] = dict(measured)
    times = {name: m["best_ms"] for name, m in measured.items()}
    case["ours_over_copy"] = round(times["ours"] / times["copy"], 2)
    case["ours_over_copy_cpu"] = round(measured["ours"]["cpu_ms"] / measured["copy"]["cpu_ms"], 2)
    case["ours_ns_per_token"] = round(1e6 * times["ours"] / rewards.numel(), 3)
    slower = {name: round(t / times["ours"], 1) for name, t in times.items() if name not in ("ours", "copy")}
    if slower:
        case["times_slower_than_ours"] = slower
    if args.device == "cpu":
        inputs_bytes = rewards.nbytes + values.nbytes + mask.nbytes
        case["memory_in_input_tensors"] = round((inputs_bytes + peak_bytes(ours)) / rewards.nbytes, 2)
        case["largest_error"] = largest_error(rewards[:1], values[:1], mask[:1], settings)
    return case


def make_mask(num_rows: int, num_tokens: int, kind: str, generator: torch.Generator) -> Tensor:
    """A response mask [B, T] of one of the MASKS."""
    if kind == "full":
        return torch.ones(num_rows, num_tokens, dtype=torch.bool)
    if kind == "random":
        return torch.rand(num_rows, num_tokens, generator=generator) >= 0.3
    lengths = torch.randint(num_tokens // 2, num_tokens + 1, (num_rows, 1), generator=generator)
    mask = torch.arange(num_tokens) < lengths
    if kind == "gaps":
        starts = torch.randint(0, max(1, num_tokens - 300), (num_rows, 8), generator=generator)
        for row in range(num_rows):
            for start in starts[row].tolist():
                mask[row, start : start + 300] = False
    return mask


def token_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam_actor: float, lam_critic: float
) -> tuple[Tensor, Tensor]:
    """The usual form of ``decoupled_gae``: one step of tensor operations per token, both λ in one loop."""
    next_value = running_actor = running_critic = torch.zeros_like(rewards[:, 0])
    advantages, returns = [], []
    for t in range(rewards.shape[1] - 1, -1, -1):
        valid, value = mask[:, t], values[:, t]
        td_error = rewards[:, t] + gamma * next_value - value
        running_actor = torch.where(valid, td_error + gamma * lam_actor * running_actor, running_actor)
        running_critic = torch.where(valid, td_error + gamma * lam_critic * running_critic, running_critic)
        next_value = torch.where(valid, value, next_value)
        advantages.append(running_actor)
        returns.append(running_critic + value)
    return torch.stack(advantages[::-1], 1) * mask, torch.stack(returns[::-1], 1) * mask


def largest_error(rewards: Tensor, values: Tensor, mask: Tensor, settings: tuple[float, float, float]) -> float:
    """Against the float64 oracle, on one row."""
    gamma, lam_actor, lam_critic = settings
    options: dict[str, Any] = {"rewards": rewards, "values": values, "mask": mask}
    options |= {"gamma": gamma, "lam_actor": lam_actor, "lam_critic": lam_critic}
    got = decoupled_gae(**options)
    return max(float((a.cpu() - b).abs().max()) for a, b in zip(got, gae_reference(**options)))


def _load(peer: str) -> Callable[..., object]:
    path, _, name = peer.rpartition(":")
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec and spec.loader, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
