"""Keeps the engines of one rollout node running: starts them, publishes them, restarts what dies or hangs."""

import http.client
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.rollout import rendezvous, server
from megatron_vcppo.rollout.auth import bearer, read_secret
from megatron_vcppo.rollout.process import free_port
from megatron_vcppo.rollout.rendezvous import SECRET, Engine
from megatron_vcppo.rollout.wire import CORE_IS_DEAD, STATUS

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 10.0
STOP_GRACE_S = 5.0
"""Between TERM and KILL of an engine's process group."""


@dataclass(frozen=True)
class Limits:
    """How long to wait for what; see config.rollout.RolloutConfig."""

    start_timeout_s: float
    health_timeout_s: float
    max_restarts: int
    poll_s: float = 1.0


@dataclass
class Slot:
    """One engine's place on this node, filled by one process after another.

    ``launch(port)`` gives the arguments and the environment of a start.
    """

    node: int
    index: int
    address: str
    folder: Path
    log_file: Path
    limits: Limits
    launch: Callable[[int], tuple[list[str], dict[str, str]]]

    def keep_running(self, stopping: threading.Event) -> None:
        """Start the engine, watch it, start it again; returns when stopping is set, raises if it dies too often.

        Runs in a thread that lives as long as the engine: the kernel kills the engine when that thread ends.
        """
        rendezvous.withdraw(self.folder, Engine(self.node, self.index, 0, self.address, 0, 0))  # a killed one's
        for generation in range(self.limits.max_restarts + 1):
            port = free_port(self.address)
            process = server.start(*self.launch(port), self.log_file)
            engine = Engine(self.node, self.index, generation, self.address, port, process.pid)
            log.info("%s: starting, pid %d", engine, process.pid)
            try:
                reason = self.watch(process, engine, stopping)
            finally:
                rendezvous.withdraw(self.folder, engine)
                kill_group(process, STOP_GRACE_S)
            if stopping.is_set():
                return
            log.warning("%s: %s; starting it again. Its log: %s", engine, reason, self.log_file)
        raise RuntimeError(f"engine {self.index} of node {self.node} ended {generation + 1} times: {reason}")

    def watch(self, process: subprocess.Popen[bytes], engine: Engine, stopping: threading.Event) -> str:
        """Publish the engine once it answers; returns why it must be replaced, or "" if stopping was set."""
        started = last_answer = time.monotonic()
        published = False
        while not stopping.wait(self.limits.poll_s):
            if process.poll() is not None:
                return f"ended with exit code {process.returncode}"
            now = time.monotonic()
            answer = probe(engine, read_secret(self.folder / SECRET))
            if answer == CORE_IS_DEAD:
                return "its core died"
            if answer == 200:
                last_answer = time.monotonic()
                if not published:
                    rendezvous.publish(self.folder, engine)
                    published = True
                    log.info("%s: ready after %.1f s", engine, last_answer - started)
            elif not published and now - started > self.limits.start_timeout_s:
                return f"not ready {self.limits.start_timeout_s:g} s after its start"
            elif published and now - last_answer > self.limits.health_timeout_s:
                return f"no answer to health checks for {self.limits.health_timeout_s:g} s"
        return ""


def probe(engine: Engine, secret: str) -> int:
    """The HTTP status of the engine's answer, 200 if its core answers too; 0 if there is none."""
    connection = http.client.HTTPConnection(engine.address, engine.port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", STATUS, headers=bearer(secret))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def kill_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a process that leads its own group, and all of that group; politely first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def run(slots: list[Slot], stopping: threading.Event) -> int:
    """Keep all engines of this node until stopping is set; returns 0 then, 1 if one was given up."""
    failures: list[BaseException] = []

    def keep(slot: Slot) -> None:
        try:
            slot.keep_running(stopping)
        except BaseException as error:
            failures.append(error)
            log.error("%s", error)
            stopping.set()

    threads = [threading.Thread(target=keep, args=(slot,), name=f"engine_{slot.index}") for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a join without a time-out would keep signals from being handled
            thread.join(0.5)
    return 1 if failures else 0
