"""Which actor and which settings make a stage's rollouts: what run/rollout_store.py records next to them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.data.prompt_format import PromptFormat
from megatron_vcppo.hf.convert.folders import is_megatron_lm, iteration_folder
from megatron_vcppo.hf.reward_model import uses_reward_model
from megatron_vcppo.run.manifest import MANIFEST_NAME, read_manifest
from megatron_vcppo.run.rollout_store import Origin
from megatron_vcppo.stages.stage import actor_before, reward_model_folder

NO_EFFECT = ("iterations", "evaluate_every", "checkpoint")
"""Keys of ``ppo`` that change no update."""


def origin_of(config: Config, stage: str) -> Origin:
    """What decides which responses a stage gets to a prompt, and their rewards."""
    sampling = {name: getattr(config.rollout, name) for name in ("temperature", "top_p", "top_k", "max_tokens", "stop")}
    prompts_config = asdict(config.prompts)
    for name in ("test", "bad_samples", "verify_workers", "verify_memory_mib"):
        del prompts_config[name]
    made: Origin = {"actor": identity(actor_before(config, stage) or Path(config.model.base))}
    made |= {"model.max_length": config.model.max_length}
    made |= {f"rollout.{name}": value for name, value in sampling.items()}
    made |= {f"prompts.{name}": value for name, value in prompts_config.items()}
    if uses_reward_model(config, stage):
        folder = reward_model_folder(config)
        assert folder is not None
        settings = asdict(config.rewards.model)
        made |= {f"rewards.model.{name}": value for name, value in settings.items() if name not in ("path", "stage")}
        made["rewards.model"] = identity(folder)
    if stage == "ppo":
        made |= {"run.seed": config.run.seed, "rollout.num_samples": config.rollout.num_samples}
        ppo = asdict(config.ppo)
        # Where origins of earlier versions have these keys: their rollouts stay valid.
        ppo["advantage"] |= asdict(config.returns)
        ppo["critic"] |= asdict(config.values)
        made |= {f"ppo.{name}": value for name, value in ppo.items() if name not in NO_EFFECT}
    return made


def origin_of_evaluation(config: Config, candidates: dict[str, Path]) -> Origin:
    """The same for the stage evaluate. candidates: name → folder of the weights."""
    made: Origin = {"actors": [[name, identity(path)] for name, path in candidates.items()]}
    made |= {f"evaluate.{name}": getattr(config.evaluate, name) for name in ("temperature", "top_p")}
    made |= {
        f"prompts.{name}": getattr(config.prompts, name) for name in ("verifiers", "task", "tools", "max_tool_calls")
    }
    made |= {"run.seed": config.run.seed, "rollout.max_tokens": config.rollout.max_tokens}
    made |= {f"prompts.{name}": value for name, value in asdict(PromptFormat.of(config.prompts)).items()}
    return made | {"prompts.test": config.prompts.test, "model.max_length": config.model.max_length}


def identity(folder: Path) -> str:
    """Equal for equal weights: a checkpoint's checksums, or names, sizes and times of another folder's files."""
    if (folder / MANIFEST_NAME).exists():
        content: Any = read_manifest(folder)["files"]
    else:
        others = is_megatron_lm(folder)
        files = sorted(iteration_folder(folder).glob("*.distcp") if others else folder.glob("*.safetensors"))
        content = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
