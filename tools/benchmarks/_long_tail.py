"""PPO stages whose responses have given lengths, each side on a core of its own if wanted.

As a module it is both roles of such a stage: the project's own ones, after the settings in RUN/long_tail.json.
"""

import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.config.load import load_config
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.generation import PendingRequest
from megatron_vcppo.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "long_tail.json"
TAIL = 10
"""Length of a long response over the mean of the others."""


@dataclass(frozen=True)
class Lengths:
    """Of responses: uniform between half and one and a half of ``mean``, but ``share`` of them ``TAIL`` × mean."""

    mean: int
    share: float
    pinned: bool
    """Engines on the first core of this process, the trainer on the second."""
    longest: int | None = None
    """If it is set, there is no such tail: every token is the last with a chance of 1 in ``mean``, up to this many."""

    def of(self, seed: int) -> int:
        """The length of the response with this sampling seed."""
        chance = random.Random(seed)
        if self.longest is not None:
            return min(self.longest, math.ceil(chance.expovariate(1 / self.mean)))
        return TAIL * self.mean if chance.random() < self.share else chance.randint(self.mean // 2, 3 * self.mean // 2)


def max_length(mean: int) -> int:
    """Of prompt and response."""
    return TAIL * mean + 128


def run_stage(folder: Path, lengths: Lengths, settings: dict[str, Any], more: list[str]) -> None:
    """The stage ppo of the demo's configuration in ``folder``, on the task next to it. Raises SystemExit if it fails.

    settings, more: keys of the configuration.
    """
    task = folder.parent / "task"
    overrides = {
        "run.dir": folder,
        "stages": "[ppo]",
        "model.hf": task / "base_model",
        "prompts.train": task / "prompts_train.jsonl",
        "prompts.test": task / "prompts_test.jsonl",
        "parallel.pp": 1,
        "rollout.ignore_eos": True,
        "rollout.max_tokens": TAIL * lengths.mean,
        "model.max_length": max_length(lengths.mean),
        "ppo.critic.init": "random_head",
        "ppo.optimizer.lr": 3e-6,
        "ppo.critic.optimizer.lr": 3e-6,
        "ppo.checkpoint.save_every": 1_000_000,
        **settings,
    }
    words = [f"{key}={value}" for key, value in overrides.items()] + more
    config = load_config(ROOT / "configs" / "demo" / "vcppo.yaml", words)
    run = RunFolder(folder)
    run.make()
    (folder / SETTINGS).write_text(json.dumps(asdict(lengths)))
    commands = RoleCommands(trainer="tools.benchmarks._long_tail", rollout="tools.benchmarks._long_tail")
    if code := run_chain(run, config, ["ppo"], commands):
        raise SystemExit(f"the stage ended with {code}; logs in {folder}")


def make_prompts(folder: Path, count: int, max_length: int) -> None:
    """The demo's task with this many prompts, and its random model with this many positions, if they are not there."""
    rows = ["--demonstrations", "1", "--validation", "1", "--test", "1", "--prompts", str(count)]
    if code := vcppo(["make-task", "--out", str(folder), "--max-length", str(max_length), *rows]):
        raise SystemExit(code)


def main() -> int:
    """One role, as its command line says."""
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    lengths = Lengths(**json.loads((config.parent / SETTINGS).read_text()))
    is_engines = "--rendezvous" in sys.argv
    if lengths.pinned:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[0] if is_engines else cores[1]})
    if is_engines:
        from megatron_vcppo.rollout.node import main as run_role
    else:
        from megatron_vcppo.stages.__main__ import main as run_role

        plan = RolloutClient.plan

        def plan_lengths(*arguments: Any, **keywords: Any) -> list[PendingRequest]:
            requests = plan(*arguments, **keywords)
            for item in requests:
                wanted = min(item.request.max_tokens, lengths.of(item.request.seed))
                item.request = msgspec.structs.replace(item.request, max_tokens=wanted)
            return requests

        RolloutClient.plan = plan_lengths  # type: ignore[method-assign]
    return run_role()


if __name__ == "__main__":
    sys.exit(main())
