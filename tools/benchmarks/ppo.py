"""PPO iterations of a run: seconds per phase, tokens/s, idle time; padding and balance of its batches under any dp.

Reads the run that is named (``vcppo run configs/demo/vcppo.yaml`` makes one). Its first iteration, which compiles and
connects, is not counted. With ``--staleness`` it makes runs of the demo's ppo stage instead, whose responses have
given lengths with a long tail, and compares them.
"""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config, ParallelConfig
from megatron_vcppo.config.load import load_config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.rollout_share import RolloutShare
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts, stored_iterations
from megatron_vcppo.stages.updates import minibatches

WORK = ("generation", "logprobs", "values", "update", "evaluation")
"""Phases in which generation or training (a forward or backward pass) runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and how its batches are shared out."""
    parser.add_argument("run_folder", type=Path, help="run folder with a ppo stage; with --staleness: to be made")
    tail = parser.add_argument_group("runs with a long tail", "1 %% of the responses are ten times as long as the mean")
    tail.add_argument("--staleness", type=int, nargs="+", help="make a run for each ppo.staleness")
    tail.add_argument("--pinned", action="store_true", help="engines on one core, the trainer on another")
    tail.add_argument("--mean-tokens", type=int, default=80, help="of the other responses (80)")
    tail.add_argument("--long-share", type=float, default=0.01, help="share of long responses (0.01)")
    tail.add_argument("--iterations", type=int, default=12, help="of each run, with the first one (12)")
    tail.add_argument("--prompts", type=int, default=128, help="of an iteration, one response each (128)")
    tail.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration of these runs")
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4, 8], help="replicas to share its rollouts over")
    parser.add_argument("--tp", type=int, help="ranks that sequence parallelism pads for; default: the run's")
    parser.add_argument("--cp", type=int, help="ranks that context parallelism pads for; default: the run's")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The mean iteration, then the packing of all stored rollouts for each number of replicas; or runs compared."""
    if args.staleness:
        yield from long_tail_cases(args)
        return
    yield iteration_case(args.run_folder)
    config = load_config(args.run_folder / "config.yaml")
    layout = {name: value for name, value in (("tp", args.tp), ("cp", args.cp)) if value}
    parallel = replace(config.parallel, **layout, **({"sequence_parallel": args.tp > 1} if args.tp else {}))
    for dp_size in args.dp:
        yield packing_case(args.run_folder, config, parallel, dp_size)


def long_tail_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A run for each staleness, then rates over that of the first."""
    from tools.benchmarks._long_tail import Lengths, make_prompts, max_length, run_stage

    folder = args.run_folder.resolve()
    lengths = Lengths(args.mean_tokens, args.long_share, args.pinned)
    make_prompts(folder / "task", args.iterations * args.prompts, max_length(args.mean_tokens))
    rates = []
    for staleness in args.staleness:
        settings = {
            "ppo.iterations": args.iterations,
            "ppo.prompts_per_iteration": args.prompts,
            "rollout.engine.per_node": 1,
            "rollout.engine.max_num_seqs": args.prompts,
            "ppo.staleness": staleness,
            "ppo.partial_rollouts": staleness > 0,
            "weight_sync.pause": "keep",
        }
        load = os.getloadavg()[0]
        with contextlib.redirect_stdout(sys.stderr):  # one JSON line per case
            run_stage(folder / f"staleness_{staleness}", lengths, settings, args.set)
        timed = read_metrics(folder / f"staleness_{staleness}" / "ppo")[1:]
        ages = {name: statistics.fmean(float(record[f"rollout/{name}"]) for record in timed)
                for name in ("staleness_mean", "staleness_max", "spans_push")}  # fmt: skip
        case = iteration_case(folder / f"staleness_{staleness}")
        rates.append(case["response_tokens_per_s"])
        about = {"staleness": staleness, "pinned": args.pinned, "load_before": round(load, 1)}
        yield about | case | {name: round(mean, 3) for name, mean in ages.items()}
    yield {"case": "over_first", "staleness": args.staleness, "ratio": [round(r / rates[0], 2) for r in rates]}


def iteration_case(run_folder: Path) -> dict[str, Any]:
    """Times of rank 0; iterations include logging and saving.

    Idle is all but ``WORK``: weight sync, advantages, logging, checkpoints. A pipeline's bubbles, and ranks that wait
    for others inside a phase, are not: there training runs. Scoring and storing after the last response are part of
    generation.
    """
    timed = read_metrics(run_folder / "ppo")[1:]
    if not timed:
        raise SystemExit(f"{run_folder}/ppo/metrics.jsonl has fewer than two iterations")

    def mean(name: str) -> float:
        return statistics.fmean(float(record.get(name, 0.0)) for record in timed)

    phases = sorted({name for record in timed for name in record if name.startswith("time/")})
    seconds = {name.removeprefix("time/").removesuffix("_s"): mean(name) for name in phases}
    iteration_s = seconds.pop("iteration")
    work_s = sum(seconds.get(phase, 0.0) for phase in WORK)
    tokens = mean("rollout/tokens")
    return {
        "case": "ppo_iteration",
        "iterations": len(timed),
        "iteration_s": round(iteration_s, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "response_tokens": round(tokens),
        "response_tokens_per_s": round(tokens / iteration_s, 1),
        "generation_tokens_per_s": round(tokens / seconds["generation"], 1),
        "padding_share": round(mean("packing/padding_share"), 4),
        "dp_imbalance": round(mean("packing/dp_imbalance"), 4),
        "idle_share": round(1 - work_s / iteration_s, 4),
    }


def packing_case(run_folder: Path, config: Config, parallel: ParallelConfig, dp_size: int) -> dict[str, Any]:
    """Shares out and packs every minibatch of the run's rollouts as an update would on ``dp_size`` replicas."""
    settings, folder = config.ppo, run_folder / "ppo" / "rollouts"
    replicas = [Packer.of(parallel, config.model, rank, dp_size) for rank in range(dp_size)]
    num_tokens = num_padding = num_microbatches = 0
    imbalance = []
    for iteration in stored_iterations(folder):
        share = RolloutShare.whole(read_rollouts(folder, iteration))
        lengths = share.batch.sequence_lengths.tolist()
        for part in minibatches(len(lengths), settings.minibatches, config.run.seed, iteration, 0):
            part_lengths = [lengths[i] for i in part]
            imbalance.append(replicas[0].imbalance(part_lengths))
            for replica in replicas:
                mine = [part[i] for i in replica.shard(part_lengths)]
                microbatches = replica.pack(share.sequences({}, mine))
                num_tokens += sum(m.num_tokens for m in microbatches)
                num_padding += sum(m.padding_tokens for m in microbatches)
                num_microbatches += len(microbatches)
    return {
        "case": "packing",
        "dp": dp_size,
        "tp": parallel.tp if parallel.sequence_parallel else 1,
        "cp": parallel.cp,
        "sequences_per_minibatch": round(settings.prompts_per_iteration * config.rollout.num_samples
                                         / settings.minibatches, 1),
        "minibatches": len(imbalance),
        "microbatches": num_microbatches,
        "tokens": num_tokens,
        "padding_share": round(num_padding / num_tokens, 5),
        "dp_imbalance": round(statistics.fmean(imbalance), 4),
        "dp_imbalance_worst": round(max(imbalance), 4),
    }  # fmt: skip
