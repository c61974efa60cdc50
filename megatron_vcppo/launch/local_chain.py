"""The chain on this machine: each stage's roles as processes, one stage after another."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from megatron_vcppo.config import Config
from megatron_vcppo.config.network import node_environment, node_network
from megatron_vcppo.config.placement import engine_nodes
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import DONE, SAVED, USER_ERROR
from megatron_vcppo.launch.attempts import run_stage
from megatron_vcppo.launch.controller import RoleProcess
from megatron_vcppo.launch.inherit import take_stages
from megatron_vcppo.launch.notify import announce
from megatron_vcppo.launch.preloaded import Preloaded
from megatron_vcppo.launch.role_commands import (
    ROLE_COMMANDS,
    RoleCommands,
    role_environment,
    starts_engines,
    trainer_layout,
)
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import write_config
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say, speaking_as
from megatron_vcppo.run.processes import free_port, has_gpu_driver
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE


def local_processes(
    run: RunFolder,
    config: Config,
    stage: str,
    role_commands: RoleCommands = ROLE_COMMANDS,
    preloaded: Preloaded | None = None,
) -> list[RoleProcess]:
    """One process per trainer rank, and one rollout supervisor if the stage generates.

    preloaded: what ranks are forked from. It has the variables of a node already when it imports libraries.
    """
    config = stage_config(config, stage)
    env, address = role_environment(config, "trainer"), node_network(config.cluster).address
    if preloaded is not None:
        env |= node_environment(config.cluster, os.environ | env)
    nodes, ranks_per_node = trainer_layout(config, stage)
    ranks, port = nodes * ranks_per_node, str(free_port(address))
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        place |= {SECRET_FILE_VARIABLE: str(run.stage(stage).secret.absolute())}
        file = f"trainer_{rank}.log"
        processes.append(
            RoleProcess(
                role="trainer",
                index=rank,
                command=role_commands.trainer_command(run, stage),
                env=env | place,
                log=file,
                shown_log=file if rank == 0 else None,
                end_signal=signal.SIGKILL,
                preloaded=preloaded,
            )
        )
    if starts_engines(config, stage):
        env = role_environment(config, "rollout")
        for node in range(engine_nodes(config)):
            command = role_commands.rollout_command(run, stage, node)
            restarts = config.cluster.rollout_restarts
            processes.append(RoleProcess("rollout", node, command, env, f"rollout_{node}.log", restarts=restarts))
    return processes


@contextmanager
def stop_requests() -> Iterator[dict[str, int]]:
    """Count the stop signals of this process: {"save": n}. The second Ctrl-C means at once."""
    count = {"save": 0, "abort": 0}

    def note(number: int, _: FrameType | None) -> None:
        count["abort" if number == signal.SIGINT and count["save"] else "save"] += 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield count
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def preloading(
    run: RunFolder, stages: list[str], role_commands: RoleCommands
) -> AbstractContextManager[Preloaded | None]:
    """What the ranks of these stages are forked from; None where there are GPUs: libraries may use them at import, and
    a process that has cannot be forked."""
    if has_gpu_driver():
        return nullcontext()
    return Preloaded(run.path, role_commands.python, [f"{role_commands.trainer}.{stage}" for stage in stages])


def run_chain(
    run: RunFolder,
    config: Config,
    stages: list[str],
    role_commands: RoleCommands = ROLE_COMMANDS,
    taken: Sequence[Path] = (),
) -> int:
    """Run the stages that are not done, in order; returns DONE or the exit code of the stage that did not finish.

    taken: finished stages of another run to begin with (launch/inherit.py). A run that another process holds is
    refused, and stays as it is.
    """
    run.make()
    with (
        speaking_as("controller"),
        run.full_disk_named(),
        run.locked(),
        stop_requests() as count,
        preloading(run, stages, role_commands) as preloaded,
    ):
        write_config(run, config)
        take_stages(run, taken)
        for number, stage in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}] {stage}:"
            if run.stage(stage).is_done():
                say(f"{head} done before, skipped")
                continue
            nodes, ranks_per_node = trainer_layout(config, stage)
            ranks = "1 rank" if nodes * ranks_per_node == 1 else f"{nodes * ranks_per_node} ranks"
            say(f"{head} starting on {ranks}, logs in {run.stage(stage).next_attempt()}")
            started = time.monotonic()

            def layout(_: Path, stage: str = stage) -> list[RoleProcess]:
                return local_processes(run, config, stage, role_commands, preloaded)

            outcome = run_stage(
                run,
                config,
                stage,
                layout,
                save_requested=lambda: count["save"] > 0,
                abort_requested=lambda: count["abort"] > 0,
            )
            seconds = time.monotonic() - started
            if outcome.code == DONE:
                say(f"{head} done in {seconds:.1f} s")
                continue
            if outcome.code == SAVED:
                say(f"{head} saved after {seconds:.1f} s; the same command continues from there")
            else:
                hint = "fix it and run the same command again" if outcome.code == USER_ERROR else "see the log"
                say(f"{head} failed after {seconds:.1f} s: {outcome.cause}; {hint}")
                announce(run, config, stage, outcome.code)
            return outcome.code
        if stages:
            announce(run, config, stages[-1], DONE)
    events.append(run.path, "chain_done", stages=stages)
    return DONE
