"""Engines that are restarted, and their processes."""

import time

import psutil

from megatron_vcppo.rollout.rendezvous import Engine
from tools.benchmarks._rollout_node import RolloutNode


def wait_until(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def wait_for_successor(node: RolloutNode, victim: Engine) -> None:
    """Until the engine in the victim's place was started again and answers."""

    def is_back() -> bool:
        return any(e.name == victim.name and e.incarnation == victim.incarnation + 1 for e in node.engines())

    wait_until(is_back, 240, f"{victim.name} is back")


def processes_of(pid: int) -> list[psutil.Process]:
    """The process and what stands below it; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
