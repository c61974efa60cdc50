"""Chains of stages that take milliseconds a step: a small configuration, waits with a deadline, a look for strays."""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from omegaconf import OmegaConf

from megatron_vcppo.config import Config
from megatron_vcppo.launch.controller import RoleProcess
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.slurm_cli import JobState, job_states
from megatron_vcppo.slurm.srun import srun_processes

TINY = RoleCommands(trainer="tools.benchmarks._tiny_stage", rollout="tools.benchmarks._tiny_rollout")
"""Takes the place of the stages' own commands."""


def tiny_config(folder: Path, stages: tuple[str, ...] = ("sft",), ranks: int = 2, steps: int = 6) -> Config:
    config = Config()
    config.run.dir, config.run.timeout_s = str(folder), 30.0
    config.model.hf = str(tiny_model(folder.parent / "model"))
    config.stages = list(stages)  # type: ignore[arg-type]
    data = str(Path(config.model.hf) / "config.json")  # never read, but it must be there
    config.sft.train, config.sft.steps, config.sft.checkpoint.save_every = data, steps, 2
    config.sft.schedule.warmup_steps = 0
    config.prompts.train = config.prompts.test = data
    config.ppo.critic.init = "random_head"
    config.cluster.trainer_ranks, config.cluster.stop_grace_s = ranks, 2.0
    return config


def tiny_model(folder: Path) -> Path:
    """A model's config.json: what is checked before anything is queued."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "float32", **sizes}))
    return folder


def write_config(config: Config) -> RunFolder:
    run = RunFolder(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), run.config)
    return run


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Command lines of live processes (not this one) that contain a text, such as a test's own folder."""
    found = []
    for pid in (name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(f"{pid} {line}")
    return found


def ranks_of(run: RunFolder, stage: str, rank: int) -> list[int]:
    """Process ids of a rank of a chain on this machine, whose command line names it."""
    lines = processes_with(f"{stage} --config {run.config}")
    return [int(line.split()[0]) for line in lines if line.split()[1] == f"RANK={rank}"]


def result(run: RunFolder, stage: str = "sft") -> dict:
    return json.loads((run.stage(stage).path / "result.json").read_text())


def cluster_config(folder: Path, stages: tuple[str, ...], steps: int = 6) -> Config:
    """The tiny configuration on the test cluster: two trainer nodes of one rank, one rollout node."""
    config = tiny_config(folder, stages, ranks=2, steps=steps)
    config.cluster.name = "devcluster"
    config.cluster.trainer_nodes, config.cluster.rollout_nodes, config.cluster.cpus_per_node = 2, 1, 2
    config.cluster.time_limit_minutes, config.cluster.save_margin_s = 5, 60
    config.cluster.setup = [f"export PYTHONPATH={Path.cwd()}"]
    return config


def steps_of(run: RunFolder, config: Config, stage: str, hosts: list[str]) -> list[RoleProcess]:
    """A stage's steps on these nodes."""
    return srun_processes(
        run=run,
        config=config,
        stage=stage,
        role_commands=RoleCommands(),
        hosts=hosts,
        address="10.0.0.1",
        port=29500,
        logs=run.path / "logs",
    )


def wait_for_jobs(jobs: Iterable[str], seconds: float) -> dict[str, JobState]:
    """The final states of jobs."""
    ids = list(jobs)

    def ended() -> bool:
        states = job_states(ids)
        return len(states) == len(ids) and not any(state.active for state in states.values())

    wait_until(ended, f"jobs {', '.join(ids)}", seconds)
    return job_states(ids)
