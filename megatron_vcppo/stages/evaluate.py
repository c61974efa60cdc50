"""pass@k and avg@k of what the chain's stages left, or of any Hugging Face checkpoints, side by side."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.architecture import Architecture
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.export_stream import stream_hf
from megatron_vcppo.mcore.hf_load import load_hf
from megatron_vcppo.mcore.model import ActorModel, build_actor
from megatron_vcppo.stages.evaluation import evaluation_metrics, evaluation_rollouts
from megatron_vcppo.stages.generation import Generation
from megatron_vcppo.stages.stage import ACTOR_STAGES, last_checkpoint, mark_done, stage_folder
from megatron_vcppo.stages.startup import startup


def run(config: Config) -> None:
    """Evaluate; writes RUN/evaluate/results.json and the responses, and prints a table."""
    folder = stage_folder(config, "evaluate")
    world = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    if config.prompts.test is None:
        raise UserError("stage evaluate: prompts.test is not set; give it held-out problems")
    loaders = candidates(config)
    model = build_actor(Architecture.from_hf(config.model.hf), config.model, config.parallel)
    startup.done("model")
    results: list[dict[str, Any]] = []
    with Generation(config, folder, world) as generation:
        generation.wait_for_engines()
        for version, (name, load) in enumerate(loaders.items()):
            load(model)
            startup.done("model")
            generation.push(version, lambda: stream_hf(model))
            # The same iteration number: every candidate gets the same problems and the same seeds.
            rollouts = evaluation_rollouts(config, generation, iteration=0)
            generation.store(version, rollouts)
            results.append(result_of(name, evaluation_metrics(rollouts, config.evaluate.k)))
            if world.is_main:
                startup.finish(folder)
                print(table(results[-1:], header=version == 0), flush=True)
    if world.is_main:
        temporary = folder / ".results.json.tmp"
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(temporary, folder / "results.json")
        print(table(results), flush=True)
        mark_done(folder, outputs=("results.json",))
    runtime.stop()


def candidates(config: Config) -> dict[str, Callable[[ActorModel], None]]:
    """Name → what loads it into a model: evaluate.checkpoints, or the actors of the chain's finished stages."""
    chosen = config.evaluate.checkpoints
    if chosen:
        for name, path in chosen.items():
            theirs, ours = Architecture.from_hf(path), Architecture.from_hf(config.model.hf)
            if theirs != ours:
                raise UserError(f"evaluate.checkpoints.{name}: {path} is another architecture than model.hf")
        return {name: partial(load_hf, folder=path) for name, path in chosen.items()}
    found: dict[str, Callable[[ActorModel], None]] = {}
    for stage in config.stages:
        checkpoint = last_checkpoint(config, stage, "actor") if stage in ACTOR_STAGES else None
        if checkpoint is not None:
            found[stage] = partial(load_model, folder=checkpoint)
    return found or {Path(config.model.hf).name: partial(load_hf, folder=config.model.hf)}


def result_of(name: str, metrics: dict[str, float]) -> dict[str, Any]:
    """One row of results.json."""
    passes = {}
    for key, value in metrics.items():
        kind, _, k = key.removeprefix("evaluation/").partition("@")
        if kind == "pass" and not k.endswith("_interval"):
            passes[k] = [value, metrics[f"{key}_interval"]]
    names = ("avg", "avg_interval", "length_mean", "truncated_share")
    return {"name": name, **{n: metrics[f"evaluation/{n}"] for n in names}, "pass": passes}


def table(results: list[dict[str, Any]], header: bool = True) -> str:
    """The results as aligned text."""
    ks = list(results[0]["pass"])
    lines = []
    if header:
        passes = "".join(f"{'pass@' + k:>18}" for k in ks)
        lines.append(f"{'checkpoint':<16}{'avg':>16}{passes}{'length':>9}{'cut':>8}")
    for row in results:
        passes = "".join(f"{100 * row['pass'][k][0]:>9.1f} ± {100 * row['pass'][k][1]:<4.1f}%" for k in ks)
        average = f"{100 * row['avg']:>7.1f} ± {100 * row['avg_interval']:<4.1f}%"
        lines.append(
            f"{row['name']:<16}{average:>16}{passes}{row['length_mean']:>9.1f}{100 * row['truncated_share']:>7.1f}%"
        )
    return "\n".join(lines)
