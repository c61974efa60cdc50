"""A real rollout node over a tiny model: the supervisor that a job's controller starts, with real engines."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from megatron_vcppo.config import EngineConfig, RolloutConfig, WeightSyncConfig
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.records import Prompt
from megatron_vcppo.rollout import rendezvous
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.rollout.rendezvous import SECRET, Engine
from megatron_vcppo.run.processes import alive, die_with_parent, without_trainer
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.tasks.word_tokenizer import WORDS, build_tokenizer
from megatron_vcppo.weight_sync.push_plan import SINGLE
from megatron_vcppo.weight_sync.sync import Source, WeightSync
from megatron_vcppo.weight_sync.transport import NetworkTransport, Transport
from tools.benchmarks._tiny_models import save_tiny_model

MAX_LENGTH = 256
START_TIMEOUT_S = 240.0
GREEDY = Sampling(temperature=0.0)


class RolloutNode:
    """``python -m megatron_vcppo.rollout.node`` over one model; a context manager."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        rollout: dict[str, Any] | None = None,
        node: int = 0,
        engines_on: str | None = None,
        address: str | None = None,
        weights: Path | None = None,
        routing_replay: bool = False,
    ) -> None:
        self.folder, self.rendezvous = folder, folder / "rendezvous"
        settings = {
            "health_timeout_s": 10.0,
            "request_timeout_s": 120.0,
            "all_dead_timeout_s": 120.0,
            **(rollout or {}),
        }
        base = {"hf": str(model), "weights": str(weights) if weights else None}
        config = {
            "run": {"dir": str(folder)},
            "model": {**base, "dtype": "float32", "max_length": MAX_LENGTH},
            "rollout": settings,
            "cluster": {"engines_on": engines_on, "network_interface": address},
            "ppo": {"routing_replay": routing_replay},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"config_{node}.yaml").write_text(yaml.safe_dump(config))
        self.command = [
            sys.executable,
            "-m",
            "megatron_vcppo.rollout.node",
            "--config",
            str(folder / f"config_{node}.yaml"),
            "--rendezvous",
            str(self.rendezvous),
            "--node",
            str(node),
            "--stage",
            "ppo",
        ]
        engine = EngineConfig(**settings.get("engine", {}))
        self.settings = RolloutConfig(**{**settings, "engine": engine})
        self.log = folder / f"serve_{node}.log"

    def __enter__(self) -> "RolloutNode":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=without_trainer(os.environ), preexec_fn=die_with_parent
            )
        return self

    def __exit__(self, *_: object) -> None:
        pids = [engine.pid for engine in self.engines()]
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
        assert not [pid for pid in pids if alive(pid)], "an engine outlived its supervisor"

    def engines(self) -> list[Engine]:
        return rendezvous.engines(self.rendezvous)

    def wait(self, count: int = 1, timeout_s: float = START_TIMEOUT_S) -> list[Engine]:
        """The engines, once ``count`` of them answer."""
        deadline = time.monotonic() + timeout_s
        while len(self.engines()) < count:
            assert self.process.poll() is None, f"the supervisor ended:\n{self.logs()}"
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s:\n{self.logs()}"
            time.sleep(0.1)
        return self.engines()

    def logs(self) -> str:
        """The ends of all logs."""
        files = [self.log, *sorted(self.rendezvous.glob("*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def client(self, **changes: Any) -> RolloutClient:
        settings = RolloutConfig(**{**vars(self.settings), **changes})
        return RolloutClient(self.rendezvous, settings, MAX_LENGTH, run_seed=7, decode=lambda ids: str(list(ids)))

    def weight_sync(
        self, timeout_s: float = 60.0, transport: Transport | None = None, pause: str = "drain"
    ) -> WeightSync:
        """The pushes of a trainer of one process."""
        secret = partial(read_secret, self.rendezvous / SECRET)
        transport = transport or NetworkTransport("127.0.0.1", torch.device("cpu"), 1 << 16, timeout_s, secret)
        config = WeightSyncConfig(timeout_s=timeout_s, pause=pause)  # type: ignore[arg-type]
        return WeightSync(config, self.rendezvous, SINGLE, RankGroup(60.0), transport)

    def greedy(self, policy_version: int, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Greedy responses of 24 tokens from engines that hold policy_version."""
        rollouts = self.client(max_tokens=24).generate(prompts, 0, policy_version, GREEDY, 1)
        return [tuple(rollout.response_ids) for rollout in rollouts]


def save_policy(folder: Path, family: str = "qwen2", tied: bool = False, seed: int = 0, **sizes: Any) -> Path:
    """A random tiny model with the tokenizer that a vLLM server asks for, and heads that it can work with on CPU."""
    save_tiny_model(folder, family, tied, seed, **{"vocab_size": len(WORDS), "hidden_size": 128, **sizes})
    build_tokenizer().save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> Source:
    """A push's source that reads a checkpoint."""
    return lambda: iter(load_file(folder / "model.safetensors").items())


def make_prompts(count: int, length: int = 12) -> list[Prompt]:
    """Deterministic prompts of random-looking tokens."""
    return [
        Prompt(f"p{i}", tuple((31 * i + 7 * j + i * j) % (len(WORDS) - 8) + 4 for j in range(length)), "", "", "test")
        for i in range(count)
    ]
