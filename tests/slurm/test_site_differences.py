"""What differs from site to site: options, variables left over, output of prologs, an environment without PATH."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.rules.slurm_options import OF_A_JOB
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.marked_lines import FINDING, marked
from megatron_vcppo.slurm.slurm_cli import command_environment, site_environment
from megatron_vcppo.slurm.srun import job_config, probe_command, step
from megatron_vcppo.slurm.submission import executor, memory_request, submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, write_config


def options(config: Config, stage: str) -> dict[str, str]:
    """The options in a stage's batch script."""
    script = executor(RunFolder.of(config), config, stage, Path("/code"), RoleCommands(), None).script()
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def gpus(tmp_path: Path) -> Config:
    """A chain on two nodes of eight GPUs, exclusive."""
    config = cluster_config(tmp_path / "run", ("sft", "export"))
    cluster = config.cluster
    cluster.gpus_per_node, cluster.cpus_per_node, cluster.memory_per_node_gb = 8, 64, 900
    cluster.sbatch = {"exclusive": "true", "constraint": "ib"}
    return config


def test_a_wckey_is_requested_only_where_one_is_configured(gpus: Config) -> None:
    assert "wckey" not in options(gpus, "sft")
    gpus.cluster.wckey = "chem"
    assert options(gpus, "sft")["wckey"] == "chem"


def test_an_export_requests_what_one_process_needs(gpus: Config) -> None:
    sft, export = options(gpus, "sft"), options(gpus, "export")
    assert (sft["nodes"], sft["gpus-per-node"], sft["cpus-per-task"], sft["mem"]) == ("2", "8", "64", "900GB")
    assert "exclusive" in sft and sft["constraint"] == export["constraint"] == "ib"
    assert (export["nodes"], export["cpus-per-task"], export["mem"]) == ("1", "8", "16GB")
    assert not {"exclusive", "gpus-per-node"} & set(export)
    assert not any("gpu" in argument for argument in step(job_config(gpus, "export"), ["a"], 1, 1))
    gpus.overrides = {"export": {"cluster": {"gpus_per_node": 1, "cpus_per_node": 16, "memory_per_node_gb": 200}}}
    export = options(gpus, "export")
    assert (export["gpus-per-node"], export["cpus-per-task"], export["mem"]) == ("1", "16", "200GB")


def test_an_evaluation_requests_the_nodes_of_one_replica(gpus: Config) -> None:
    gpus.cluster.trainer_nodes, gpus.cluster.rollout_nodes, gpus.cluster.trainer_ranks = 4, 2, None
    gpus.parallel.tp, gpus.parallel.dp = 8, None
    evaluate = options(gpus, "evaluate")
    assert (evaluate["nodes"], evaluate["gpus-per-node"]) == ("3", "8") and options(gpus, "ppo")["nodes"] == "6"
    gpus.overrides = {"evaluate": {"cluster": {"trainer_nodes": 4}}}
    assert options(gpus, "evaluate")["nodes"] == "6"


def test_mail_is_requested_by_every_batch_script(gpus: Config) -> None:
    gpus.cluster.sbatch |= {"mail-user": "me@example.org", "mail-type": "FAIL,INVALID_DEPEND"}
    for stage in gpus.stages:
        found = options(gpus, stage)
        assert (found["mail-user"], found["mail-type"]) == ("me@example.org", "FAIL,INVALID_DEPEND")


def test_what_a_batch_script_sets_itself_is_owned_or_may_be_replaced(gpus: Config) -> None:
    replaceable = {"mem", "partition", "account", "qos", "wckey", *gpus.cluster.sbatch}
    gpus.cluster.partition = gpus.cluster.account = gpus.cluster.qos = gpus.cluster.wckey = "x"
    script = executor(RunFolder.of(gpus), gpus, "sft", Path("/code"), RoleCommands(), "7").script()
    found = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    assert found <= replaceable | set(OF_A_JOB) and {"dependency", "signal", "open-mode"} <= found


def test_a_dry_run_names_the_memory_that_a_job_requests(gpus: Config) -> None:
    assert memory_request(gpus, "sft") == "900GB per node" and memory_request(gpus, "export") == "16GB per node"
    gpus.cluster.memory_per_node_gb = None
    assert memory_request(gpus, "sft") == "the cluster's default"
    gpus.cluster.sbatch["mem_per_cpu"] = "8G"
    assert memory_request(gpus, "sft") == "8G per CPU"
    gpus.cluster.sbatch = {"mem": "0"}
    assert memory_request(gpus, "sft") == "all of each node"


def test_gres_replaces_gpus_per_node_in_the_job_and_in_its_steps(gpus: Config) -> None:
    gpus.cluster.sbatch = {"gres": "gpu:h100:8", "mem-per-cpu": "8G", "mail-type": "FAIL,INVALID_DEPEND"}
    gpus.cluster.memory_per_node_gb = None
    sft = options(gpus, "sft")
    assert sft["mail-type"] == "FAIL,INVALID_DEPEND"
    assert (sft["gres"], sft["mem-per-cpu"]) == ("gpu:h100:8", "8G") and not {"gpus-per-node", "mem"} & set(sft)
    command = step(job_config(gpus, "sft"), ["a", "b"], 8, 8)
    assert "--gres=gpu:h100:8" in command and not any("gpus-per-node" in argument for argument in command)
    assert "gres" not in options(gpus, "export")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sbatch", {"mem-per-cpu": "8G"}, "cluster.sbatch.mem-per-cpu and cluster.memory_per_node_gb 900 both request"),
        ("dir", "/shared/%j/run", "run.dir '/shared/%j/run' must not hold '%' on a cluster"),
    ],
)
def test_what_slurm_would_misread_is_refused(gpus: Config, key: str, value: object, message: str) -> None:
    setattr(gpus.run if key == "dir" else gpus.cluster, key, value)
    gpus.cluster.trainer_ranks = None
    with pytest.raises(UserError, match=message):
        check_config(gpus)


def test_variables_of_another_job_do_not_reach_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    left_over = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "none", "SBATCH_TIMELIMIT": "1", "SQUEUE_PARTITION": "x"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "HOME": "/home/me"}
    assert command_environment(left_over | kept | {"SBATCH_WCKEY": "w"}) == kept | {"SBATCH_WCKEY": "w"}
    for name, value in (left_over | kept).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with site_environment("#SBATCH --partition=gpu"):
        assert not set(left_over) & set(os.environ) and os.environ["SBATCH_ACCOUNT"] == "mine"
    with site_environment("#SBATCH --account=ours"):
        assert "SBATCH_ACCOUNT" not in os.environ, "the configured account counts"
    assert dict(os.environ) == before


def test_a_sites_output_is_not_taken_for_what_a_node_lacks(tmp_path: Path) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    script = probe_command(config, RunFolder.of(config), RoleCommands(), ["a"])[-1]
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env={"SLURMD_NODENAME": "node7"})
    missing = f"node7: does not see {tmp_path / 'run' / 'config.yaml'}: run.dir must be on a shared file system"
    assert marked("Welcome to the cluster\n" + done.stdout, FINDING) == [missing]
    assert marked("Welcome to the cluster\n", FINDING) == []


def test_the_script_finds_slurms_commands_without_a_path(gpus: Config) -> None:
    script = executor(RunFolder.of(gpus), gpus, "sft", Path("/code"), RoleCommands(), None).script()
    lines = [line for line in script.splitlines() if "PATH" in line and "PYTHON" not in line]
    shown = subprocess.run(
        ["/usr/bin/env", "-i", "/bin/bash", "-c", "\n".join([*lines, "env"])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\nPATH=/" in f"\n{shown.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_chain_passes_through_a_difficult_site(
    cluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prolog that prints, no environment handed on, and the variables of another job where it is submitted."""
    prolog = tmp_path / "prolog.sh"
    prolog.write_text("#!/bin/sh\necho print Welcome to the cluster\n")
    prolog.chmod(0o755)
    left_over = {
        "SBATCH_TIMELIMIT": "1:00",
        "SBATCH_GRES": "none:1",
        "SLURM_NTASKS": "7",
        "SLURM_CPU_BIND": "map_cpu:0",
    }
    for name, value in (left_over | {"SBATCH_PARTITION": "nowhere"}).items():
        monkeypatch.setenv(name, value)
    config = cluster_config(tmp_path / "run", ("sft", "export"))
    config.cluster.partition = "main"
    config.cluster.sbatch = {"export": "NONE"}
    config.cluster.srun = {"mpi": "none", "unbuffered": "true"}
    config.cluster.setup += [f"export SLURM_TASK_PROLOG={prolog}"]
    config.run.notify = f'echo "$VCPPO_EVENT: $VCPPO_STAGE" >> {tmp_path}/mail'
    run = write_config(config)
    jobs = submit(run, config, list(config.stages), TINY)
    states = wait_for_jobs(jobs.values(), 120)
    log = run.job_log(jobs["sft"]).read_text()
    assert {state.state for state in states.values()} == {"COMPLETED"}, log
    assert result(run, "export")["trained"] == [1, 2, 3, 4, 5, 6]
    outputs = [path.read_text() for path in run.stage("sft").attempts()[0].glob("trainer_*.log")]
    assert outputs and all("Welcome" in text for text in outputs), "the prolog printed"
    assert (tmp_path / "mail").read_text() == "done: export\n"
    assert [(status.state, status.job) for status in run_status(run, config)] == [
        ("done", jobs["sft"]),
        ("done", jobs["export"]),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_environment_without_path_is_named_and_not_taken_for_a_lost_node(
    cluster: DevCluster, tmp_path: Path
) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    config.cluster.setup += ["unset PATH"]
    config.run.notify = f'echo "$VCPPO_EVENT: $VCPPO_CAUSE" > {tmp_path}/mail'
    run = write_config(config)
    jobs = submit(run, config, ["sft"], TINY)
    states = wait_for_jobs(jobs.values(), 120)
    assert {state.state for state in states.values()} == {"FAILED"}
    assert len(events.of_stage(run.path, "job", "sft")) == 1, "not requeued"
    assert "does the job's environment have a PATH? see cluster.setup" in table(run_status(run, config))
    assert (tmp_path / "mail").read_text().startswith("failed: ")
