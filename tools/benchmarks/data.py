"""Packing, balancing, tokenizing and scoring: the work on data between generation and training."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vcppo.data.packing import balance, pack_all, pack_into_microbatches
from megatron_vcppo.data.sft_dataset import load_sft_dataset
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.records import Prompt, Rollout, TrainSequence
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.tasks.generate import TASKS, demonstration_rows
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer
from tools.benchmarks._measure import time_together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--items", type=int, default=4096, help="sequences to pack and to balance (4096)")
    parser.add_argument("--demonstrations", type=int, default=4000, help="samples to make, tokenize, score (4000)")
    parser.add_argument("--repeats", type=int, default=10)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per part."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.5, 0.7, args.items), 16, 8192).astype(int).tolist()
    yield from _bins(lengths, args.repeats)
    yield from _tensors(lengths[:256], args.repeats)
    yield from _tasks(args.demonstrations, args.repeats)


def _bins(lengths: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    for budget in (8192, 32768):
        bins = pack_into_microbatches(lengths, budget)
        timing = time_together({"bins": partial(pack_into_microbatches, lengths, budget)}, repeats)
        least = ceil_div(sum(lengths), budget)
        yield {"case": "pack_into_microbatches", "items": len(lengths), "budget": budget, "bins": len(bins),
               "least_possible": least, **timing["bins"]}  # fmt: skip
    for num_ranks in (8, 64):
        loads = [sum(lengths[i] for i in indices) for indices in balance(lengths, num_ranks)]
        timing = time_together({"ranks": partial(balance, lengths, num_ranks)}, repeats)
        yield {"case": "balance", "items": len(lengths), "ranks": num_ranks,
               "max_over_mean": round(max(loads) / np.mean(loads), 5), **timing["ranks"]}  # fmt: skip


def _tensors(lengths: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    names = ("loss_mask", "advantages", "old_logprobs", "returns")
    sequences = [
        TrainSequence(tuple(range(n)), dict.fromkeys(names, (0.0,) * n) | {"loss_mask": (False,) * n}) for n in lengths
    ]
    microbatches = pack_all(sequences, 8192, multiple=8)
    timing = time_together({"pack": lambda: pack_all(sequences, 8192, multiple=8)}, repeats)["pack"]
    yield {"case": "pack_all", "tokens": sum(lengths), "fields": len(names), "microbatches": len(microbatches),
           "padding_share": round(sum(m.padding_tokens for m in microbatches) / sum(lengths), 5),
           "tokens_per_s": round(1e3 * sum(lengths) / timing["median_ms"]), **timing}  # fmt: skip


def _tasks(count: int, repeats: int) -> Iterator[dict[str, Any]]:
    task, tokenizer = TASKS["running_sum"], build_tokenizer()
    rows = list(demonstration_rows(task, "train", task.default_steps, 0, count))
    rollouts = [
        Rollout(Prompt(f"p:{i}", (1,), row["prompt"], row["answer"], row["task"]), 0, 0, (1,), row["response"], (0.0,),
                "stop", 0)
        for i, row in enumerate(rows)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Scorer(num_workers=2, timeout_s=10.0) as scorer:
        source = Path(folder) / "sft.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset, _ = load_sft_dataset(str(source), tokenizer, 1024)
        functions = {
            "make_demonstrations": lambda: list(demonstration_rows(task, "train", task.default_steps, 0, count)),
            "tokenize": lambda: load_sft_dataset(str(source), tokenizer, 1024),
            "score": lambda: scorer.score(rollouts),
        }
        for name, timing in time_together(functions, min(repeats, 5)).items():
            yield {"case": name, "samples": count, "tokens": int(dataset.lengths.sum()),
                   "samples_per_s": round(1e3 * count / timing["median_ms"]), **timing}  # fmt: skip
