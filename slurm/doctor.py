"""Checks a cluster profile step by step: each check is one line, and says what to change where it fails."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from slurm.query import slurm, slurm_message
from slurm.roles import Programs
from slurm.run_folder import RunFolder
from slurm.srun import in_container, probe_command, step
from slurm.submit import executor, request_text
from slurm.validate import check_scripts, check_slurm_installed

WAIT_FOR_NODES_S = 120
TEST_JOB_TIMEOUT_S = 300


def checks(config: Config, programs: Programs, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and body of every check, in order; a body returns what it found or raises UserError with what to do."""
    cluster = config.cluster

    def commands() -> str:
        check_slurm_installed()
        return slurm("sbatch", "--version").strip()

    def controller() -> str:
        return slurm("scontrol", "ping").strip().splitlines()[0]

    def partition() -> str:
        wanted = ("-p", cluster.partition) if cluster.partition else ()
        lines = slurm("sinfo", "-h", *wanted, "-o", "%P %D %t %c %G").split("\n")
        if not lines[0]:
            known = sorted(set(slurm("sinfo", "-h", "-o", "%R").split()))
            raise UserError(f"no partition {cluster.partition}; there are: {', '.join(known)}: set cluster.partition")
        return "; ".join(line for line in lines if line)

    def request() -> str:
        run = RunFolder(folder)
        check_scripts(
            [(executor(run, config, "ppo", folder, programs, None).script(), request_text(config, "ppo"))], folder
        )
        return f"{cluster.trainer_nodes} + {cluster.rollout_nodes} nodes would be granted"

    def nodes() -> str:
        (folder / "config.yaml").write_text("")
        found = test_job(config, folder, probe_command(config, RunFolder(folder), programs, hosts=[]))
        return (
            found or f"all {cluster.trainer_nodes + cluster.rollout_nodes} see {folder} and have the Python environment"
        )

    def collective() -> str:
        argv = in_container(config, (programs.python, "-m", "slurm.allreduce_probe", str(folder)))
        lines = [json.loads(line) for line in test_job(config, folder, argv).splitlines() if line.startswith("{")]
        short = [line for line in lines if line["gpus"] < cluster.gpus_per_node]
        if short:
            raise UserError(
                f"{short[0]['node']}: torch sees {short[0]['gpus']} GPUs, cluster.gpus_per_node is "
                f"{cluster.gpus_per_node}: is this torch built for the driver there?"
            )
        slowest = min(line["gib_per_s"] for line in lines)
        return f"{lines[0]['backend']} over {len(lines)} nodes: {slowest} GiB/s, first in {lines[0]['first_s']} s"

    def isolation() -> str:
        argv = in_container(config, (programs.python, "-m", "megatron_vcppo.rewards.sandbox.choice"))
        return "; ".join(sorted(test_job(config, folder, argv).splitlines()))

    yield "Slurm's commands", commands
    yield "Slurm's controller", controller
    yield "partition", partition
    yield "account, qos, nodes, GPUs", request
    yield "file system and Python", nodes
    yield "GPUs and collectives", collective
    yield "isolation of programs (rewards.code)", isolation


def test_job(config: Config, folder: Path, argv: tuple[str, ...]) -> str:
    """Run one task per node in an allocation of its own, bounded; returns its output."""
    cluster = config.cluster
    num_nodes = cluster.trainer_nodes + cluster.rollout_nodes
    if argv[0] != "srun":
        argv = (*step(config, [], 1, 1), *argv)
    options = [
        "--kill-on-bad-exit=1",
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes}",
        "--time=5",
        f"--immediate={WAIT_FOR_NODES_S}",
    ]
    options += [f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(cluster, name))]
    dropped = ("--nodes=", "--nodelist=", "--ntasks=", "--overlap", "--open-mode=", "--kill-on-bad-exit=")
    kept = [argument for argument in argv if not argument.startswith(dropped)]
    return run_bounded(["srun", *options, *kept[1:]])


def run_bounded(argv: list[str]) -> str:
    """Output of a command; UserError with its first line of complaint."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TEST_JOB_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the test job did not end in {TEST_JOB_TIMEOUT_S} s") from None
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if not line.startswith("{")]
        raise UserError(said[0] if said else slurm_message(done.stderr)[-600:] or f"exit code {done.returncode}")
    return done.stdout


def examine(config: Config, programs: Programs, parent: Path) -> bool:
    """Print one line per check; True if all passed. A check after a failed one may still be of use, so all run."""
    folder = Path(tempfile.mkdtemp(prefix=".vcppo_doctor_", dir=parent))
    good = True
    try:
        for name, check in checks(config, programs, folder):
            try:
                print(f"ok    {name}: {check()}", flush=True)
            except UserError as error:
                good = False
                print(f"FAIL  {name}: {error}", flush=True)
                if name == "Slurm's commands":
                    break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return good
