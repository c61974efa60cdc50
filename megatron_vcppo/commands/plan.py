"""vcppo plan: what a chain will need, estimated before anything is queued."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vcppo.launch.chain_plan import StagePlan
NOT_READ = {"run.dir": "run", "sft.train": "data", "prompts.train": "data", "prompts.test": "data"}
"""Required keys that a plan does not depend on."""
LENGTH_KEYS = {"sft": "sft.steps is not set", "evaluate": "evaluate.num_prompts is not set"}
"""Why the length of a stage is not known: the data are not read."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        description="Estimate what a chain needs: memory per rank by part, room of the engines, bytes and time of a "
        "push, time per phase and stage, GPU-hours, disk. Times follow from the keys below hardware and "
        "cluster.link_gb_per_s. Of the model only config.json is read. Exit code 1: a stage does not fit.",
    )
    parser.add_argument("config", type=Path, help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to override")
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from megatron_vcppo.commands.arguments import print_note
    from megatron_vcppo.config.load import load_config
    from megatron_vcppo.config.sections.hardware import HardwareConfig
    from megatron_vcppo.config.value_sources import local_overrides, profile_files
    from megatron_vcppo.hf.architecture import Architecture
    from megatron_vcppo.launch.chain_plan import plan_chain
    from megatron_vcppo.launch.checks import check_kind_of_model
    from megatron_vcppo.launch.engine_estimate import response_tokens

    overrides, profiles = [*local_overrides(args.cluster), *args.overrides], profile_files(args.cluster)
    config = load_config(args.config, overrides, profiles=profiles, note=print_note, defaults=NOT_READ)
    arch = Architecture.from_hf(config.model.hf)
    check_kind_of_model(arch, config, config.stages)
    stages = plan_chain(arch, config, list(config.stages))
    gpus = config.cluster.gpus_per_node
    if not gpus and config.hardware.tflops == HardwareConfig().tflops:
        print_note(
            "warning: cluster.gpus_per_node is 0, but the figures below hardware are a GPU's: the times are far too "
            "short; set hardware.tflops, mfu, memory_gb_per_s and step_ms to those of the CPUs (docs/slurm.md)"
        )
    if args.json:
        print(
            json.dumps({"parameters": arch.parameter_count(), "stages": [as_dict(s, gpus) for s in stages]}, indent=2)
        )
    else:
        active = f", {arch.active_parameter_count() / 1e9:.2f} of them for each token" if arch.experts else ""
        print(f"{arch.parameter_count() / 1e9:.2f} billion parameters{active}\n\n{as_text(stages, gpus)}")
        print(f"Times are for responses of {response_tokens(config):,} tokens (hardware.response_tokens)")
        if "ppo" in config.stages and config.ppo.evaluate_every and config.evaluate.num_prompts is None:
            print("Those of ppo are without its evaluations: evaluate.num_prompts is not set")
    return 0 if all(stage.fits for stage in stages) else 1


def as_dict(stage: "StagePlan", gpus_per_node: int) -> dict[str, Any]:
    """JSON-able, with what follows from the rest."""
    found = asdict(stage) | {"step_s": stage.step_s, "hours": stage.hours, "gpu_hours": gpu_hours(stage, gpus_per_node)}
    if stage.push:
        found["push"] |= {"seconds": stage.push.seconds, "computed": str(stage.push)}
    return found


def gpu_hours(stage: "StagePlan", gpus_per_node: int) -> float | None:
    """Of all nodes that the stage holds; without GPUs node-hours. An export's job requests no GPU."""
    if stage.stage == "export" and gpus_per_node:
        return 0.0
    return None if stage.hours is None else stage.hours * stage.nodes * max(1, gpus_per_node)


def as_text(stages: list["StagePlan"], gpus_per_node: int) -> str:
    """Tables, and below them what does not fit."""
    from megatron_vcppo.report.text_table import text_table

    hours = "GPU-hours" if gpus_per_node else "node-hours"
    lines = [
        text_table(
            [
                {
                    "stage": stage.stage,
                    "nodes": stage.nodes,
                    "ranks": stage.ranks,
                    "steps": "?" if stage.steps is None else stage.steps,
                    "s per step": stage.step_s if stage.phases_s else "?" if stage.steps is None else "",
                    "hours": "?" if stage.hours is None else stage.hours,
                    hours: "?" if stage.hours is None else gpu_hours(stage, gpus_per_node),
                    "checkpoints GB": stage.checkpoints_gb,
                    "rollouts GB": stage.rollouts_gb,
                }
                for stage in stages
            ]
        ),
        "\nMemory in GiB on the fullest rank",
        text_table(
            [
                {
                    "stage": stage.stage,
                    **{name: round(size, 2) for name, size in stage.memory_gib.items()},
                    "total": round(sum(stage.memory_gib.values()), 2),
                    "limit": "" if stage.limit_gib is None else stage.limit_gib,
                    "fits": "yes" if stage.fits else "NO",
                }
                for stage in stages
                if stage.memory_gib
            ]
        ),
        "\nSeconds of a step by phase; once: of the whole stage",
        text_table(
            [
                {"stage": stage.stage, **stage.phases_s, **{f"once: {name}": s for name, s in stage.once_s.items()}}
                for stage in stages
                if stage.phases_s or stage.once_s
            ]
        ),
    ]
    for stage in stages:
        if len(set(stage.stage_layers)) > 1:
            lines.append(f"\n{stage.stage}: layers of the pipeline stages: {', '.join(map(str, stage.stage_layers))}")
    for stage in stages:
        if stage.engines and stage.push:
            engines = stage.engines
            lines += [
                f"\n{stage.stage}: {engines.engines} engines, {engines.cache_gib:.1f} GiB of KV cache per worker, "
                f"{engines.cache_tokens:,} tokens and {engines.concurrency} responses at a time per engine",
                f"{stage.stage}: push: {stage.push}",
            ]
    known = sum(stage.hours or 0.0 for stage in stages)
    unknown = [f"{stage.stage} ({LENGTH_KEYS[stage.stage]})" for stage in stages if stage.hours is None]
    spent = sum(gpu_hours(stage, gpus_per_node) or 0.0 for stage in stages)
    disk = sum(stage.checkpoints_gb + stage.rollouts_gb for stage in stages)
    note = f", without {', '.join(unknown)}" if unknown else ""
    lines.append(f"\nThe chain: {known:.1f} hours, {spent:,.0f} {hours}, {disk:,.0f} GB on disk{note}")
    for stage in stages:
        if not stage.fits:
            lines.append(f"\n{stage.stage} does not fit: {advice(stage)}")
    return "\n".join(lines)


def advice(stage: "StagePlan") -> str:
    """What would make it fit."""
    if stage.engines is not None and stage.engines.concurrency < 1:
        return "its engines have no room for a response next to the weights: raise rollout.engine.tp"
    if stage.better:
        return f"the nearest layout that does: {' '.join(stage.better)}"
    return "no layout of these ranks does: add nodes (cluster.trainer_nodes)"
