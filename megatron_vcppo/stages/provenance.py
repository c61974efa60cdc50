"""Which actor and which settings made the rollouts in a folder, so that others are never taken for them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.run.files import write_json
from megatron_vcppo.run.log import say
from megatron_vcppo.run.manifest import MANIFEST_NAME, read_manifest
from megatron_vcppo.run.rollout_store import drop_partial, partial_iterations, stored_iterations
from megatron_vcppo.run.stored_set import FILE_NAME as SET_NAME
from megatron_vcppo.stages.stage import actor_before

ORIGIN_NAME = "origin.json"
NO_EFFECT = ("iterations", "evaluate_every", "skip_limit", "checkpoint")
"""Keys of ``ppo`` that change no update."""

Origin = dict[str, Any]
"""Dotted key → value."""


def origin_of(config: Config, stage: str) -> Origin:
    """What decides which responses a stage gets to a prompt, and their rewards."""
    sampling = {name: getattr(config.rollout, name) for name in ("temperature", "top_p", "top_k", "max_tokens", "stop")}
    prompts_config = asdict(config.prompts)
    for name in ("test", "bad_samples", "verify_workers"):
        del prompts_config[name]
    made: Origin = {"actor": identity(actor_before(config, stage) or Path(config.model.hf))}
    made |= {"model.max_length": config.model.max_length}
    made |= {f"rollout.{name}": value for name, value in sampling.items()}
    made |= {f"prompts.{name}": value for name, value in prompts_config.items()}
    if stage == "ppo":
        made |= {"run.seed": config.run.seed, "rollout.num_samples": config.rollout.num_samples}
        made |= {f"ppo.{name}": value for name, value in asdict(config.ppo).items() if name not in NO_EFFECT}
    return made


def origin_of_evaluation(config: Config, candidates: dict[str, Path]) -> Origin:
    """The same for the stage evaluate. candidates: name → folder of the weights."""
    made: Origin = {"actors": [[name, identity(path)] for name, path in candidates.items()]}
    made |= {f"evaluate.{name}": getattr(config.evaluate, name) for name in ("temperature", "top_p")}
    made |= {"prompts.verifiers": config.prompts.verifiers, "prompts.task": config.prompts.task}
    made |= {"run.seed": config.run.seed, "rollout.max_tokens": config.rollout.max_tokens}
    return made | {"prompts.test": config.prompts.test, "model.max_length": config.model.max_length}


def identity(folder: Path) -> str:
    """Equal for equal weights: a checkpoint's checksums, or names, sizes and times of a Hugging Face folder's files."""
    if (folder / MANIFEST_NAME).exists():
        content: Any = read_manifest(folder)["files"]
    else:
        files = sorted(folder.glob("*.safetensors"))
        content = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(folder: Path, made: Origin) -> list[str]:
    """The keys in which what made a folder's rollouts differs; empty if nothing is recorded."""
    try:
        known = json.loads((folder / ORIGIN_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [key for key, value in json.loads(json.dumps(made)).items() if known.get(key) != value]


def claim(folder: Path, made: Origin, reached: int) -> None:
    """Record the provenance of this folder's rollouts and delete those that no longer match. Main rank only.

    Rollouts that something else made are dropped if they belong to iterations after ``reached``: an interrupted
    iteration is trained again on the responses that it had, but not on those of another policy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    different = differences(folder, made)
    later = [iteration for iteration in stored_iterations(folder) if iteration > reached] if different else []
    if later:
        say(
            f"{folder}: iterations {later[0]} to {later[-1]} were generated under other settings "
            f"({', '.join(different)}): they are generated again"
        )
    # Negative: evaluations within a stage, of an actor that other settings may no longer lead to.
    for iteration in partial_iterations(folder) if different else []:
        if iteration > reached or iteration < 0:
            drop_partial(folder, iteration)
    for iteration in later:
        for path in folder.glob(f"iter_{iteration:07d}_*.jsonl.zst"):
            path.unlink()
    if different:
        (folder / SET_NAME).unlink(missing_ok=True)
    write_json(folder / ORIGIN_NAME, made)
