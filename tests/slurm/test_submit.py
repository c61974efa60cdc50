"""Submission against a real Slurm of virtual nodes: the chain, its status, refusals, bad input."""

import pytest

from megatron_vcppo.commands.arguments import check_not_queued
from megatron_vcppo.errors import UserError
from megatron_vcppo.run import events
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.slurm_cli import job_states
from megatron_vcppo.slurm.submission import cancel_jobs, dry_run, submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_chain_of_jobs_runs_to_its_end(cluster: DevCluster, tmp_path) -> None:
    config = cluster_config(tmp_path / "run", ("sft", "ppo", "export"))
    run = write_config(config)
    jobs = submit(run, config, list(config.stages), TINY)
    with pytest.raises(UserError, match=f"this run is active, jobs .*{jobs['sft']}"):
        submit(run, config, list(config.stages), TINY)
    with pytest.raises(UserError, match=f"this run is active, jobs .*{jobs['sft']}"):
        check_not_queued(run)
    states = wait_for_jobs(jobs.values(), 120)
    assert {state.state for state in states.values()} == {"COMPLETED"}
    for stage in config.stages:
        assert result(run, stage)["trained"] == [1, 2, 3, 4, 5, 6]
    assert [status.state for status in run_status(run, config)] == ["done"] * 3
    assert submit(run, config, list(config.stages), TINY) == {}
    assert (run.stage("ppo").attempts()[-1] / "rollout_0.log").read_text().startswith("incarnation 0\n")
    assert {event["code"] for event in events.read(run.path) if event["event"] in ("submitted", "job")} == {
        folder.name for folder in (run.path / "code").iterdir()
    }, "the jobs ran the snapshot"
    nodes = {event["stage"]: len(event["nodes"]) for event in events.read(run.path) if event["event"] == "job"}
    assert nodes == {"sft": 2, "ppo": 3, "export": 1}


def test_a_colocated_layout_and_a_change_of_it_at_a_resume(cluster: DevCluster, tmp_path) -> None:
    config = cluster_config(tmp_path / "run", ("ppo",), steps=200)
    config.cluster.rollout_nodes = 0
    run = write_config(config)
    jobs = submit(run, config, ["ppo"], TINY)
    wait_until(lambda: run.stage("ppo").checkpoint_iteration(), "a checkpoint")
    assert [len(event["nodes"]) for event in events.of_stage(run.path, "job", "ppo")] == [2]
    assert {path.name for path in run.stage("ppo").attempts()[0].glob("rollout*")} == {"rollout_0.log", "rollout_1.log"}
    cancel_jobs(list(jobs.values()))
    wait_for_jobs(jobs.values(), 60)
    reached = run.stage("ppo").checkpoint_iteration()
    assert reached
    config.cluster.trainer_nodes, config.cluster.trainer_ranks, config.cluster.rollout_nodes = 1, 1, 2
    config.sft.steps = reached + 3
    write_config(config)
    states = wait_for_jobs(submit(run, config, ["ppo"], TINY).values(), 60)
    assert {state.state for state in states.values()} == {"COMPLETED"}
    assert result(run, "ppo")["trained"] == list(range(1, reached + 4))
    assert [len(event["nodes"]) for event in events.of_stage(run.path, "job", "ppo")] == [2, 3]


def test_bad_data_cancels_the_dependents_and_status_says_why(cluster: DevCluster, tmp_path) -> None:
    config = cluster_config(tmp_path / "run", ("sft", "ppo"))
    config.sft.train = "bad"
    run = write_config(config)
    jobs = submit(run, config, list(config.stages), TINY)
    states = wait_for_jobs(jobs.values(), 60)
    assert states[jobs["sft"]].state == "FAILED" and states[jobs["ppo"]].state == "CANCELLED"
    text = table(run_status(run, config))
    assert "data.jsonl:7: sample has no response" in text and f"vcppo resume {run.path}" in text
    assert len(run.stage("sft").attempts()) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partition", "nowhere", "invalid partition specified: nowhere"),
        ("gpus_per_node", 9, "not available"),
        ("trainer_nodes", 7, "[Mm]ore processors requested than permitted|not available|Node count"),
    ],
)
def test_slurms_own_message_is_shown_and_nothing_is_queued(cluster: DevCluster, tmp_path, key, value, message) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    setattr(config.cluster, key, value)
    config.cluster.trainer_ranks = 7 if key == "trainer_nodes" else 2
    run = write_config(config)
    with pytest.raises(UserError, match=message):
        submit(run, config, ["sft"], TINY)
    assert not cluster.command("squeue", "-h").stdout


def test_a_dry_run_writes_scripts_and_queues_nothing(cluster: DevCluster, tmp_path) -> None:
    config = cluster_config(tmp_path / "run", ("sft", "ppo"))
    run = write_config(config)
    folder = dry_run(run, config, ["sft", "ppo"], TINY)
    needs = "about 3 GiB per rank, requested main memory: the cluster's default"
    graph = f"sft: 2 nodes, {needs}\nppo: 3 nodes, {needs}, after the success of sft\n"
    assert (folder / "graph.txt").read_text() == graph
    script = (folder / "ppo.sh").read_text()
    for line in ("--dependency=afterok:JOB_OF_sft", "--kill-on-invalid-dep=yes", "--requeue", "--nodes=3"):
        assert f"#SBATCH {line}" in script
    assert "--signal=B:USR2@120" in script and script.index("trap '' USR2\n") < script.index("\nexec ")
    assert not cluster.command("squeue", "-h").stdout


def test_a_job_that_slurm_forgot_is_no_error(cluster: DevCluster) -> None:
    assert job_states(["999999"]) == {}
