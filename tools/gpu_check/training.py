"""``tools/bench.py train`` at 1.3 billion parameters and micro-batches of 16K tokens: MFU, memory, FP8."""

import argparse
from typing import Any

from tools.benchmarks import train
from tools.gpu_check.parity import te_installed
from tools.gpu_check.rows import Row, at_least, at_most, skipped

SIZES = {
    "full": "--hidden 2048 --head-dim 128 --layers 24 --vocab 32768 --sequences 16 --median-length 4096 --spread 0 "
    "--max-length 4096 --tokens-per-microbatch 16384 --rounds 4",
    "tiny": "--hidden 128 --layers 1 --vocab 200 --sequences 2 --median-length 32 --spread 0 --max-length 32 "
    "--tokens-per-microbatch 64 --rounds 1 --cores 1",
}
FP8_SIZES = {
    "full": "--hidden 2048 --head-dim 128 --layers 12 --vocab 32768 --sequences 8 --median-length 4096 --spread 0 "
    "--max-length 4096 --tokens-per-microbatch 16384 --rounds 20 --lr 1e-4",
    "tiny": SIZES["tiny"],
}
MFU_GOAL, MFU_LEAST = 0.50, 0.40
PLAN_TOLERANCE = 0.10
RECIPES = ("delayed", "current", "blockwise")


def run(target: str, size: str) -> list[Row]:
    """Own layers, and Transformer Engine's where they are: model FLOP/s over the card's peak, memory over the plan."""
    rows = []
    kinds = {"own": ["--own-layers"]} | ({"te": []} if te_installed(target) else {})
    for kind, options in kinds.items():
        try:
            case = bench(f"{SIZES[size]} --dtype bfloat16", *options)
        except RuntimeError as error:  # out of memory, above all
            rows.append(Row(f"{kind} layers", str(error), "trains", "FAIL"))
            continue
        what = f"{kind} layers, {case['parameters'] / 1e9:.2f} B parameters, {case['tokens_per_s']} tokens/s"
        mfu = case["mfu"]
        if mfu is None:
            rows.append(skipped(f"{what}: MFU", f"no peak known for {case['device']}: tools/benchmarks/train.py"))
        elif kind == "te":
            rows.append(at_least(f"{what}: MFU (the aim is {MFU_GOAL})", mfu, MFU_LEAST))
        else:  # the goal is that of a GPU cluster, which has Transformer Engine
            rows.append(Row(f"{what}: MFU", f"{mfu:.3g}"))
        rows.append(memory_row(kind, case))
    if "te" not in kinds:
        rows.append(skipped("te layers", "Transformer Engine is not installed, or no CUDA"))
    return rows


def memory_row(kind: str, case: dict[str, Any]) -> Row:
    """Peak of tensors over the plan of launch/memory_plan.py."""
    peak, planned = case["peak_memory_gib"], case["planned_memory_gib"]
    if peak is None:
        return skipped(f"{kind} layers: peak memory over the plan", "not measured on a CPU")
    what = f"{kind} layers: peak memory {peak:.1f} GiB, planned {planned:.1f}: off by"
    return at_most(what, abs(peak / planned - 1), PLAN_TOLERANCE)


def run_fp8(target: str, size: str) -> list[Row]:
    """Every recipe: the losses of 20 steps on one batch against bf16's, and the speed."""
    if why := no_fp8(target):
        return [skipped("FP8 against bf16", why)]
    plain = bench(f"{FP8_SIZES[size]} --dtype bfloat16")
    rows = []
    for recipe in RECIPES:
        try:
            case = bench(f"{FP8_SIZES[size]} --dtype bfloat16 --set fp8=hybrid fp8_recipe={recipe}")
        except RuntimeError as error:  # a card that lacks a recipe's kernels says so in its own words
            rows.append(Row(f"FP8 {recipe}", str(error), "runs", "FAIL"))
            continue
        rows += fp8_rows(recipe, case, plain)
    return rows


def fp8_rows(recipe: str, case: dict[str, Any], plain: dict[str, Any]) -> list[Row]:
    """Losses within 2 %; the speed only as a figure: it depends on the model's size.

    The area between the curves over the area below bf16's: the batch is learned by heart, and ratios of losses near
    zero say nothing.
    """
    between = sum(abs(a - b) for a, b in zip(case["losses"], plain["losses"], strict=True))
    gap = between / sum(plain["losses"])
    speed = case["tokens_per_s"] / plain["tokens_per_s"]
    last = f"last loss {case['losses'][-1]:.3f}, bf16 {plain['losses'][-1]:.3f}"
    return [
        at_most(f"FP8 {recipe}, difference of losses ({last})", gap, 0.02),
        Row(f"FP8 {recipe}, speed over bf16", f"{speed:.2f}"),
    ]


def no_fp8(target: str) -> str:
    """Why FP8 cannot be tried, or ""."""
    if not te_installed(target):
        return "Transformer Engine is not installed, or no CUDA"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "" if (major, minor) >= (8, 9) else f"compute capability {major}.{minor} has no FP8, 8.9 and newer do"


def bench(text: str, *options: str) -> dict[str, Any]:
    """The Megatron side's case of ``tools/bench.py train``."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    (case,) = train.run(parser.parse_args(["--sides", "megatron", *text.split(), *options]))
    return case
