"""The chain on this machine: each stage's roles as processes, one stage after another."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_vcppo.config import Config
from megatron_vcppo.config.engine_environment import cpu_engine_environment
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
from megatron_vcppo.run.access import following
from megatron_vcppo.run.config_file import write_config
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say, speaking_as
from megatron_vcppo.run.processes import free_port, has_gpu_driver, without_trainer
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE


@dataclass(frozen=True)
class Preloads:
    """What the processes of each role are forked from; None: they are executed."""

    trainer: Preloaded | None = None
    rollout: Preloaded | None = None


NO_PRELOADS = Preloads()


def local_processes(
    run: RunFolder,
    config: Config,
    stage: str,
    role_commands: RoleCommands = ROLE_COMMANDS,
    preloads: Preloads = NO_PRELOADS,
) -> list[RoleProcess]:
    """One process per trainer rank, and one rollout supervisor if the stage generates."""
    config = stage_config(config, stage)
    env, address = role_environment(config, "trainer"), node_network(config.cluster).address
    if preloads.trainer is not None:
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
                preloaded=preloads.trainer,
            )
        )
    if starts_engines(config, stage):
        env = rollout_environment(config, preloads)
        for node in range(engine_nodes(config)):
            processes.append(
                RoleProcess(
                    role="rollout",
                    index=node,
                    command=role_commands.rollout_command(run, stage, node),
                    env=env,
                    log=f"rollout_{node}.log",
                    restarts=config.cluster.rollout_restarts,
                    preloaded=preloads.rollout,
                )
            )
    return processes


def rollout_environment(config: Config, preloads: Preloads) -> dict[str, str]:
    """Of a rollout supervisor: the whole one of its engines, if these are forked from it."""
    env = role_environment(config, "rollout")
    if preloads.rollout is None:
        return env
    base = {**os.environ, **env}
    base |= node_environment(config.cluster, base)
    cpus, engine = len(os.sched_getaffinity(0)), config.rollout.engine
    wanted = without_trainer(base) | cpu_engine_environment(engine, cpus // engine.per_node or cpus, base)
    return dict.fromkeys(os.environ.keys() - wanted.keys(), "") | wanted


def prepare_engines(config: Config, stages: list[str], preloads: Preloads) -> None:
    """Start importing what the engines of the first of these stages that has some will need; end that if none has."""
    first = next((stage for stage in stages if starts_engines(config, stage)), None)
    if preloads.rollout is not None and first is not None:
        env = rollout_environment(stage_config(config, first), preloads)
        preloads.rollout.prepare(RoleProcess("rollout", 0, (), env, "").whole_environment())
    elif preloads.rollout is not None:
        preloads.rollout.end()


_counts: list[dict[str, int]] = []


@contextmanager
def stop_requests() -> Iterator[dict[str, int]]:
    """Count the stop signals of this process: {"save": n}. The second Ctrl-C means at once.

    Blocks may be nested: a request that comes when a chain has nothing left to save, or not begun, is not lost.
    """
    count = dict(_counts[-1]) if _counts else {"save": 0, "abort": 0}

    def note(number: int, _: FrameType | None) -> None:
        for one in _counts:
            one["abort" if number == signal.SIGINT and one["save"] else "save"] += 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    _counts.append(count)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield count
    finally:
        _counts.pop()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def preloading(run: RunFolder, config: Config, stages: list[str], role_commands: RoleCommands) -> Iterator[Preloads]:
    """What the roles of these stages are forked from; nothing where there are GPUs: libraries may use them at import,
    and a process that has cannot be forked."""
    if has_gpu_driver():
        yield NO_PRELOADS
        return
    python, modules = role_commands.python, [f"{role_commands.trainer}.{stage}" for stage in stages]
    with ExitStack() as stack:
        trainer = stack.enter_context(Preloaded(run.preloaded_log("trainer"), python, modules))
        rollout = None
        if role_commands.engine and any(starts_engines(config, stage) for stage in stages):
            rollout = stack.enter_context(Preloaded(run.preloaded_log("rollout"), python, [role_commands.engine]))
        yield Preloads(trainer, rollout)


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
        run.storage_errors_named(),
        following(config.run.access),
        run.locked(),
        stop_requests() as count,
        preloading(run, config, stages, role_commands) as preloads,
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

            prepare_engines(config, stages[number - 1 :], preloads)

            def layout(_: Path, stage: str = stage) -> list[RoleProcess]:
                return local_processes(run, config, stage, role_commands, preloads)

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
