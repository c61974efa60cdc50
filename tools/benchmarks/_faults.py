"""Faults inflicted on a running chain on a real Slurm; each returns what it cost. Used by the tests and the bench."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.slurm_cli import job_states
from megatron_vcppo.slurm.submission import submit, submitted_jobs
from tools.benchmarks._tiny_chains import (
    TINY,
    cluster_config,
    processes_with,
    result,
    wait_for_jobs,
    wait_until,
    write_config,
)

Inflict = Callable[[DevCluster, RunFolder, Config], None]
CHAIN = ("sft", "reward_model", "value_pretrain", "ppo", "evaluate", "export")


@dataclass(frozen=True)
class Fault:
    """What happens to which chain."""

    inflict: Inflict | None = None
    stages: tuple[str, ...] = ("sft", "ppo")
    steps: int = 30
    iteration_s: float = 0.2
    seconds: float = 240.0
    """Within which everything must be done."""
    limit_minutes: int = 5
    small_disk: bool = False
    """The run folder is a file system of 5 MB (root only)."""
    plain: str = "none"
    """The entry of FAULTS with the same chain and no fault."""
    data: str = "unused"

    @property
    def needs_root(self) -> bool:
        return self.small_disk

    @contextmanager
    def chain(self, folder: Path) -> Iterator[tuple[RunFolder, Config]]:
        """The chain in its run folder, before it is submitted."""
        config = cluster_config(folder, self.stages, steps=self.steps)
        config.sft.checkpoint.save_every, config.sft.train = 5, self.data
        config.cluster.environment["TINY_SECONDS"] = str(self.iteration_s)
        config.cluster.time_limit_minutes = self.limit_minutes
        if not self.small_disk:
            yield write_config(config), config
            return
        config.cluster.environment["TINY_BYTES"] = "1000000"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(folder)], check=True)
        try:
            yield write_config(config), config
        finally:
            unmounted = ["umount", str(folder)]
            wait_until(lambda: subprocess.run(unmounted, capture_output=True).returncode == 0, "the disk to be free")


def suffer(cluster: DevCluster, run: RunFolder, config: Config, fault: Fault) -> dict[str, Any]:
    """Submit, inflict, wait until every stage is done; verify the end; return the costs.

    Whatever happened: every stage's manifest verifies, and every iteration is in the final state exactly once.
    """
    stages: list[str] = [*config.stages]
    steps = config.sft.steps
    assert steps
    started = time.monotonic()
    submit(run, config, stages, TINY)
    if fault.inflict:
        fault.inflict(cluster, run, config)

    def all_done() -> bool:
        jobs = submitted_jobs(run)
        states = job_states(list(jobs.values()))
        ended = {stage: states[job].state for stage, job in jobs.items() if job in states and not states[job].active}
        bad = {stage: state for stage, state in ended.items() if state != "COMPLETED"}
        assert not bad, f"{bad}: {events.read(run.path)[-3:]}"
        return len(ended) == len(stages)

    wait_until(all_done, f"the chain in {run.path}", fault.seconds)
    wall_s = time.monotonic() - started
    repeated = 0
    once = list(range(1, steps + 1))
    for stage in stages:
        assert run.stage(stage).is_done()
        assert result(run, stage) == {"trained": once, "total": sum(once)}, stage
        repeated += len(run.stage(stage).recent_metrics()) - steps
    attempts = sum(len(run.stage(stage).attempts()) for stage in stages)
    return {"wall_s": round(wall_s, 1), "attempts": attempts, "iterations_repeated": repeated}


def wait_for_checkpoint(run: RunFolder, stage: str, seconds: float = 90) -> None:
    wait_until(lambda: run.stage(stage).checkpoint_iteration(), f"a checkpoint of {stage}", seconds)


def kill_processes(mark: str, variable: str) -> int:
    """SIGKILL the processes whose command line has ``mark`` and whose environment has ``variable``."""
    killed = 0
    for line in (line for line in processes_with(mark) if "guard.py" not in line):
        pid = int(line.split()[0])
        try:
            if f"\0{variable}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, signal.SIGKILL)
                killed += 1
        except OSError:
            continue
    return killed


def kill_trainer_rank(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    wait_for_checkpoint(run, "sft")
    assert kill_processes("tools.benchmarks._tiny_stage sft", "RANK=1") == 1


def kill_rollout_server(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    wait_for_checkpoint(run, "ppo")
    published = run.stage("ppo").rendezvous / "engine_0.json"
    assert kill_processes("tools.benchmarks._tiny_rollout", f"SLURM_STEP_NODELIST={cluster.node_names[2]}") == 1
    wait_until(lambda: '"incarnation": 1' in published.read_text(), "the rollout unit to come back", 30)


def preempt(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    wait_for_checkpoint(run, "sft")
    argv = ("sbatch", "-p", "high", "-N4", "--exclusive", "--parsable", "-o", "/dev/null", "--wrap", "sleep 2")
    done = cluster.command(*argv)
    assert done.returncode == 0, done.stderr
    wait_for_jobs([done.stdout.strip()], 90)


def cancel_and_resume(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    wait_for_checkpoint(run, "sft")
    jobs = submitted_jobs(run)
    cluster.command("scancel", jobs["sft"])
    states = wait_for_jobs(jobs.values(), 60)
    assert {state.state for state in states.values()} == {"CANCELLED"}
    submit(run, config, list(config.stages), TINY)


def cut_power(index: int) -> Inflict:
    """Of a node: slurmd, step daemons and tasks, all at once; the node comes back after 25 s."""

    def inflict(cluster: DevCluster, run: RunFolder, config: Config) -> None:
        wait_for_checkpoint(run, "sft")
        node = cluster.node_names[index]
        assert cluster.cut_power(node) > 0
        time.sleep(25)
        cluster.start_node(node)

    return inflict


def restart_slurmctld(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    """After it has saved its state, which it does every few seconds: jobs queued since are lost to any Slurm."""
    queued, state = time.time(), cluster.root / "state" / "job_state"
    wait_for_checkpoint(run, "sft")
    wait_until(lambda: state.stat().st_mtime > queued, "slurmctld to save its state", 60)
    cluster.kill("slurmctld")
    time.sleep(3)
    cluster.start_controller()


def full_disk(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    """The stage fails at a checkpoint, says so, and continues once there is room."""

    def failures() -> list[dict[str, Any]]:
        """An attempt before may have ended for a port that was taken meanwhile: it is repeated."""
        ends = [e for e in events.read(run.path) if e["event"] == "attempt_end"]
        return [end for end in ends if "No space left" in " ".join(end["details"])]

    wait_until(failures, "the failure", 90)
    assert failures()[0]["code"] not in (0, 75)
    wait_for_jobs(submitted_jobs(run).values(), 60)
    subprocess.run(["mount", "-o", "remount,size=64m", str(run.path)], check=True)
    submit(run, config, list(config.stages), TINY)


def fail_for_good(cluster: DevCluster, run: RunFolder, config: Config) -> None:
    """Bad data: the dependents are cancelled, the status names the line; fixed, the chain continues."""
    jobs = submitted_jobs(run)
    states = wait_for_jobs(jobs.values(), 60)
    assert [states[job].state for job in jobs.values()] == ["FAILED", "CANCELLED"]
    text = table(run_status(run, config))
    assert "data.jsonl:7: sample has no response" in text and f"fix it, then vcppo resume {run.path}" in text
    assert len(run.stage("sft").attempts()) == 1
    config.sft.train = "unused"
    write_config(config)
    submit(run, config, list(config.stages), TINY)


LONG = Fault(stages=CHAIN, steps=90, iteration_s=0.4, seconds=900, limit_minutes=30, plain="none, six longer stages")
"""Each stage takes more than half of a one-minute limit, before which it is not asked to save."""
FAULTS = {
    "none": Fault(),
    "trainer rank killed": Fault(kill_trainer_rank),
    "rollout server killed": Fault(kill_rollout_server),
    "preempted by a higher partition": Fault(preempt),
    "stage cancelled, vcppo resume": Fault(cancel_and_resume),
    "power cut: a trainer node": Fault(cut_power(1)),
    "power cut: the controller's node": Fault(cut_power(0)),
    "slurmctld killed and restarted": Fault(restart_slurmctld),
    "disk full at a checkpoint": Fault(full_disk, small_disk=True),
    "bad data, fixed": Fault(fail_for_good, data="bad"),
    "none, six longer stages": LONG,
    "time limit in each of six stages": replace(LONG, limit_minutes=1),
}
