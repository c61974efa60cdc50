"""Stages that generate, on forked ranks with engines that outlive them: a killed stage starts again in seconds."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.config import Config
from megatron_vcppo.data.prompts import PromptStream, load_prompts
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.run.manifest import MANIFEST_NAME, read_manifest
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from megatron_vcppo.stages.__main__ import main as run_rank
from megatron_vcppo.stages.stored_batches import StoredBatches
from tests.helpers.distributed import RanksFailed, run_distributed_test
from tests.helpers.stops import at_call
from tools.benchmarks._rollout_node import RolloutNode
from tools.benchmarks._tiny_chains import write_config

NUM_PROMPTS = 20
"""Iterations of 8 prompts cross the borders between epochs."""


def make_task(folder: Path) -> Path:
    sizes = ["--demonstrations", "200", "--validation", "8", "--prompts", str(NUM_PROMPTS), "--test", "8"]
    assert vcppo(["make-task", "--out", str(folder), *sizes]) == 0
    return folder


def make_config(task: Path, run: Path, sections: dict[str, Any]) -> Config:
    """Two pipeline stages; ``sections`` is merged over tiny sizes."""
    base = {
        "run": {"dir": str(run), "timeout_s": 90},
        "model": {"hf": str(task / "base_model"), "dtype": "float32", "max_length": 256},
        "parallel": {"pp": 2, "tokens_per_microbatch": 512},
        "stages": ["value_pretrain", "ppo"],
        "sft": {"train": ""},
        "prompts": {"train": str(task / "prompts_train.jsonl"), "test": str(task / "prompts_test.jsonl")},
        "rollout": {"max_tokens": 24},
        # The node outlives the trainer here: so long an engine may wait for one that was killed in a push.
        "weight_sync": {"timeout_s": 60},
        "value_pretrain": {
            "init": "sft",
            "steps": 6,
            "batch_size": 8,
            "checkpoint": {"save_every": 2},
            "optimizer": {"lr": 1e-3},
        },
        "ppo": {
            "iterations": 6,
            "prompts_per_iteration": 8,
            "minibatches": 2,
            "checkpoint": {"save_every": 2},
            "optimizer": {"lr": 1e-3},
            "critic": {"optimizer": {"lr": 1e-3}},
            "evaluate_every": 3,
        },
    }
    merged = OmegaConf.merge(OmegaConf.structured(Config), base, sections)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


@dataclass(frozen=True)
class KillPoint:
    """A method at whose n-th call a rank may be killed, n up to ``max_calls``."""

    owner: type
    method: str
    max_calls: int


KILL_POINTS = (
    KillPoint(StoredBatches, "store", 1),
    KillPoint(Learner, "train_step", 2),
    KillPoint(CheckpointFolder, "save", 1),
)
"""Early enough in every attempt that what is left of six steps, saved every second one, has room for two more kills."""


class Stage:
    """One stage of a run, again and again until it is done."""

    def __init__(self, node: RolloutNode, config: Config, name: str) -> None:
        self.config, self.name, self.folder = config, name, Path(config.run.dir) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rendezvous").symlink_to(node.rendezvous)
        parallel = config.parallel
        self.num_ranks = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)

    @property
    def done(self) -> bool:
        return (self.folder / MANIFEST_NAME).exists()

    def run(self, before: Callable[[], object] = lambda: None) -> list[int]:
        """What the launcher runs, on forked ranks; their exit codes. before: called on each rank."""
        path = write_config(self.config).config

        def rank() -> int:
            sys.argv[1:] = [self.name, "--config", str(path)]
            before()
            return run_rank()

        return run_distributed_test(rank, self.num_ranks, timeout_s=200)

    def run_with_kills(self, kills: int, seed: int, points: Sequence[KillPoint] = KILL_POINTS) -> None:
        """As many attempts in which a random rank is killed at a random one of the points, then one to the end."""
        chance = random.Random(seed)
        for _ in range(kills):
            victim, point = chance.randrange(self.num_ranks), chance.choice(points)
            number = chance.randint(1, point.max_calls)

            def kill_there(victim: int = victim, point: KillPoint = point, number: int = number) -> None:
                if int(os.environ["RANK"]) == victim:
                    at_call(point.owner, point.method, number, lambda: os.kill(os.getpid(), signal.SIGKILL))

            with pytest.raises(RanksFailed, match=f"rank {victim}: exit code -9"):
                self.run(kill_there)
        assert set(self.run()) == {0}

    def assert_every_prompt_once(self, num_prompts: int, iterations: int, seed: int) -> None:
        """Stored rollouts and log are those of a stream that nothing interrupted; with staleness in any order."""
        keys = self.config.prompts
        prompts, _ = load_prompts(keys.train, load_tokenizer(self.config.model.hf), 255)
        stream = PromptStream(prompts, seed)
        batches = [
            [rollout.prompt.prompt_id for rollout in read_rollouts(self.folder / "rollouts", iteration)]
            for iteration in range(1, iterations + 1)
        ]
        wanted = [[prompt.prompt_id for prompt in stream.next(num_prompts)] for _ in batches]
        if self.config.ppo.staleness and self.name == "ppo":
            assert [*map(len, batches)] == [num_prompts] * iterations
            assert sorted(chain(*batches)) == sorted(chain(*wanted))
        else:
            assert batches == wanted
        records = read_metrics(self.folder)
        assert [record["iteration"] for record in records] == list(range(1, iterations + 1))

    def replay(self, node: RolloutNode, folder: Path) -> "Stage":
        """The same stage without a kill, in a run folder that has nothing but the stored rollouts and what came
        before."""
        config = replace(self.config, run=replace(self.config.run, dir=str(folder)))
        again = Stage(node, config, self.name)
        shutil.copytree(self.folder / "rollouts", again.folder / "rollouts")
        before = Path(self.config.run.dir) / "value_pretrain"
        if self.name != "value_pretrain" and before.exists():
            shutil.copytree(before, folder / "value_pretrain", symlinks=True)
        assert set(again.run()) == {0}
        for path in (self.folder / "rollouts").iterdir():
            assert path.read_bytes() == (again.folder / "rollouts" / path.name).read_bytes(), "generated again"
        return again

    def checkpoint(self) -> dict[str, Any]:
        """Sizes and checksums of the last checkpoint's files: weights, moments, state."""
        path = self.folder / read_manifest(self.folder)["meta"]["checkpoint"]
        state = json.loads((path / "state.json").read_text())
        del state["config_hash"]  # the run folder is another one
        files = {name: file for name, file in read_manifest(path)["files"].items() if name.endswith(".distcp")}
        assert files
        return {**files, "state": state}
