"""Starts of a stage's job that leave nothing to the next one."""

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import cloudpickle

from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run import events
from megatron_vcppo.run.rollout_store import write_partial, write_rollouts
from megatron_vcppo.slurm.job import StageJob, futile_starts, progress
from tools.benchmarks._tiny_chains import tiny_config, write_config


def test_whatever_a_start_leaves_to_the_next_is_progress(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("ppo",))
    run = write_config(config)
    rollouts, checkpoints = run.stage("ppo").rollouts, run.stage("ppo").checkpoints

    def start() -> None:
        events.append(run.path, "job", stage="ppo", job="7", progress=progress(run, config, "ppo"))

    def save(name: str, state: dict[str, Any]) -> None:
        (checkpoints / name).mkdir(parents=True, exist_ok=True)
        (checkpoints / name / "state.json").write_text(json.dumps({"state": state}))
        (checkpoints / name / "manifest.json").touch()

    for number in range(1, 4):
        start()
        assert futile_starts(run, config, "ppo") == number
    rollout = Rollout(Prompt("p", (1,), "", "", "t"), 0, 0, (2,), "", (-1.0,), "stop", 0)
    steps = [{"report": {"skipped": {"critic": [False] * n, "actor": []}}} for n in (1, 2)]
    for work in (
        lambda: write_partial(rollouts, 1, RolloutPart.whole([rollout]), 0, 1),
        lambda: write_partial(rollouts, 1, RolloutPart.whole([rollout] * 9), 0, 1),
        lambda: write_rollouts(rollouts, 1, RolloutPart.whole([rollout])),
        lambda: save("iter_0000000", {"unfinished": steps[0]}),
        lambda: save("iter_0000000", {"unfinished": steps[1]}),
        lambda: save("iter_0000001", {}),
    ):
        work()
        assert futile_starts(run, config, "ppo") == 0
        start()
        assert futile_starts(run, config, "ppo") == 1


def test_what_is_queued_holds_names_only_so_that_another_python_can_read_it(tmp_path: Path) -> None:
    """The login node's Python may be another one than the nodes': code of functions would not pass between them."""
    job = cloudpickle.dumps(StageJob(tmp_path, "sft", RoleCommands(python="/nodes/python")))
    names = {argument for code, argument, _ in pickletools.genops(job) if isinstance(argument, str)}
    assert not any("cloudpickle" in name or name in ("CodeType", "_make_function", "marshal") for name in names)
    assert pickle.loads(job) == StageJob(tmp_path, "sft", RoleCommands(python="/nodes/python"))
