"""Arms of an experiment: runs that share finished stages, sweeps and their table, roles that are not needed."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.commands.sweep import results
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.inherit import take_stages
from megatron_vcppo.launch.local_chain import local_processes
from megatron_vcppo.launch.sweep_points import points, write_points
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.run.stored_set import stored_set
from megatron_vcppo.slurm.srun import stage_nodes
from tools.benchmarks._tiny_chains import tiny_config, tiny_model, units_on, write_config


def test_an_export_is_one_process_on_one_node(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ("sft", "export"), ranks=16)
    cluster = config.cluster
    cluster.trainer_nodes, cluster.gpus_per_node, cluster.cpus_per_node = 2, 8, 64
    run = write_config(config)
    assert (stage_nodes(config, "sft"), stage_nodes(config, "export")) == (2, 1)
    (unit,) = units_on(run, config, "export", ["a"])
    assert {"--nodelist=a", "--ntasks=1", "--cpus-per-task=64"} <= set(unit.command)
    (unit,) = local_processes(run, config, "export")
    assert unit.env["WORLD_SIZE"] == "1" and len(local_processes(run, config, "sft")) == 16


def test_no_engines_start_where_the_set_of_rollouts_is_complete(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("value_pretrain",))
    config.value_pretrain.init, config.value_pretrain.rollouts = "sft", "stored"
    run = write_config(config)

    def roles() -> list[str]:
        here = local_processes(run, config, "value_pretrain")
        there = units_on(run, config, "value_pretrain", ["a"])
        assert {unit.role for unit in here} == {unit.role for unit in there}
        return [unit.role for unit in here]

    assert roles() == ["trainer", "trainer", "rollout"]
    made = stored_set(config, "value_pretrain")
    assert made is not None
    made.folder.mkdir(parents=True)
    made.mark_complete()
    assert roles() == ["trainer", "trainer"]


def test_lists_that_are_values_do_not_vary() -> None:
    made, fixed = points(["stages=[ppo, evaluate]", "evaluate.k=[[1], [1, 4]]", "ppo.loss.tis_cap=[null, 2.0]"])
    assert fixed == ["stages=[ppo, evaluate]"]
    assert [point.overrides for point in made] == [
        ("evaluate.k=[1]", "ppo.loss.tis_cap=null"),
        ("evaluate.k=[1]", "ppo.loss.tis_cap=2.0"),
        ("evaluate.k=[1, 4]", "ppo.loss.tis_cap=null"),
        ("evaluate.k=[1, 4]", "ppo.loss.tis_cap=2.0"),
    ]
    with pytest.raises(UserError, match="nothing varies"):
        points(["ppo.critic.bounds=[-1.0, 1.0]"])


def test_a_sweeps_table_says_what_came_out(tmp_path: Path) -> None:
    made, _ = points(["ppo.advantage.lam_actor=[0.95, 1.0]"])
    write_points(tmp_path, made)
    config = tiny_config(tmp_path / made[0].name, ("sft", "ppo", "evaluate"))
    config.prompts.test = "test.jsonl"
    run = write_config(config)
    for stage in ("ppo", "evaluate"):
        (run.stage(stage).logs / "attempt_1").mkdir(parents=True)
    record = {"iteration": 9, "rollout/accuracy": 0.75, "critic/explained_variance": 0.25, "critic/value_loss": 1.0}
    run.stage("ppo").metrics.write_text(json.dumps(record) + "\n")
    found = [{"name": "sft", "avg": 0.4, "avg_interval": 0.04}, {"name": "ppo", "avg": 0.85, "avg_interval": 0.03}]
    run.stage("evaluate").results.write_text(json.dumps(found))
    first, second = results(tmp_path)
    assert first["rollout/accuracy"] == 0.75 and "critic/value_loss" not in first
    assert first["avg of sft"] == "40.0 ± 4.0" and first["avg of ppo"] == "85.0 ± 3.0" and first["stage"] == "evaluate"
    assert second == {"run": "1", "ppo.advantage.lam_actor": "1.0"}


def finish(run: RunFolder, stage: str, size: int = 100_000) -> None:
    """A stage as it is when it is done: a checkpoint, a log, and what only belongs to that attempt."""
    checkpoint = run.stage(stage).checkpoint(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(size))
    run.stage(stage).rendezvous.mkdir()
    run.stage(stage).metrics.write_text('{"iteration": 1}\n')
    write_manifest(checkpoint, {})
    run.stage(stage).mark_done(checkpoint=checkpoint)


def test_a_run_begins_with_the_stages_of_another(tmp_path: Path) -> None:
    chain = ("sft", "value_pretrain", "ppo")
    configs = [tiny_config(tmp_path / name, chain) for name in ("base", "arm")]
    for config in configs:
        config.value_pretrain.init = "sft"
    base, run = map(write_config, configs)
    with pytest.raises(UserError, match="stage sft is not done there"):
        take_stages(run, config, base.path, "ppo")
    with pytest.raises(UserError, match="takes the stages before --from STAGE"):
        take_stages(run, config, base.path, None)
    finish(base, "sft")
    finish(base, "value_pretrain")
    finish(base, "ppo")
    take_stages(run, config, base.path, "ppo")
    take_stages(run, config, base.path, "ppo")
    assert run.stage("sft").is_done() and run.stage("value_pretrain").is_done() and not run.stage("ppo").path.exists()
    weights = "checkpoints/iter_0000001/weights"
    assert (run.stage("sft").path / weights).samefile(base.stage("sft").path / weights)
    assert not run.stage("sft").metrics.samefile(base.stage("sft").metrics)
    assert not run.stage("sft").rendezvous.exists()
    run.stage("value_pretrain").manifest.unlink()
    with pytest.raises(UserError, match="was begun here"):
        take_stages(run, config, base.path, "ppo")
    config.model.hf = str(tiny_model(tmp_path / "another"))
    with pytest.raises(UserError, match=r"its model\.hf is"):
        take_stages(run, config, base.path, "ppo")
