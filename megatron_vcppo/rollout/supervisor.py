"""Keeps the engines of one rollout node running: starts them, publishes them, restarts what dies or hangs."""

import http.client
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_vcppo.errors import DONE, FAILED
from megatron_vcppo.rollout import engine_command, rendezvous
from megatron_vcppo.rollout.auth import PLACE_VARIABLE, PROOF_HEADER, Call, digest_of
from megatron_vcppo.rollout.engine_sockets import VARIABLE, socket_folder
from megatron_vcppo.rollout.messages import CORE_IS_DEAD, SLEEP, STATUS, SleepRequest, TurnReport
from megatron_vcppo.rollout.node_folder import Hold, NodeFolder
from megatron_vcppo.rollout.rendezvous import SECRET, Engine
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.run.secret import read_secret

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
    turn_timeout_s: float = 0.0
    """Where the trainer has the same GPUs: how long its turn may last."""


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
    shared: NodeFolder | None = None
    """Where the trainer has the same GPUs: says whose turn it is."""
    sleep_level: int = 2

    @property
    def name(self) -> str:
        """engine_NODE_INDEX."""
        return f"engine_{self.node}_{self.index}"

    def keep_running(self, stopping: threading.Event) -> None:
        """Start the engine, watch it, start it again; returns when stopping is set, raises if it dies too often.

        Runs in a thread that lives as long as the engine: the kernel kills the engine when that thread ends.
        """
        rendezvous.withdraw(self.folder, Engine(self.node, self.index, 0, self.address, 0, 0))  # a killed one's
        for incarnation in range(self.limits.max_restarts + 1):
            starting = self.take_turn(stopping)
            if stopping.is_set():
                return
            port = free_port(self.address)
            with socket_folder() as sockets:
                arguments, variables = self.launch(port)
                engine = Engine(self.node, self.index, incarnation, self.address, port, pid=0)
                variables = {**variables, VARIABLE: str(sockets), PLACE_VARIABLE: engine.place}
                process = engine_command.start(arguments, variables, self.log_file)
                engine = msgspec.structs.replace(engine, pid=process.pid)
                how = "forked" if isinstance(process, engine_command.ForkedEngine) else "executed"
                log.info("%s: starting, pid %d, %s", engine, process.pid, how)
                try:
                    reason = self.watch(process, engine, stopping, starting)
                finally:
                    with self.mark():  # until its last process is gone, it may hold GPU memory
                        rendezvous.withdraw(self.folder, engine)
                        kill_group(process, STOP_GRACE_S)
                    starting.close()
            if stopping.is_set():
                return
            log.warning("%s: %s; starting it again. Its log: %s", engine, reason, self.log_file)
        raise RuntimeError(f"engine {self.index} of node {self.node} ended {incarnation + 1} times: {reason}")

    def mark(self) -> Hold | ExitStack:
        """Says, until it is closed, that this engine may hold GPU memory and cannot be asked to sleep."""
        return self.shared.hold(f"starting_{self.name}") if self.shared is not None else ExitStack()

    def take_turn(self, stopping: threading.Event) -> Hold | ExitStack:
        """Wait until this engine may take GPU memory; returns the mark that it starts.

        The trainer looks for starting engines after it took its turn, so one of the two sees the other. Raises
        RuntimeError if the trainer's turn does not end.
        """
        deadline = time.monotonic() + self.limits.turn_timeout_s
        while True:
            starting = self.mark()
            if self.shared is None or self.shared.engines_turn or stopping.is_set():
                return starting
            starting.close()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.name} waits to start, and the trainer's turn on the GPUs did not end within "
                    f"{self.limits.turn_timeout_s:g} s (rollout.turn_timeout_s)"
                )
            stopping.wait(self.limits.poll_s)

    def watch(
        self, process: engine_command.Started, engine: Engine, stopping: threading.Event, starting: Hold | ExitStack
    ) -> str:
        """Publish the engine once it answers; returns why it must be replaced, or "" if stopping was set.

        On GPUs that the trainer has, too, it is asleep when it is published, and starts no more.
        """
        started = last_answer = time.monotonic()
        published = False
        while not stopping.wait(self.limits.poll_s):
            if process.poll() is not None:
                return f"ended with exit code {process.returncode}"
            now = time.monotonic()
            answer = probe(engine, read_secret(self.folder / SECRET))
            if answer == CORE_IS_DEAD:
                return "its core died, or a change of its GPU memory failed"
            if answer == 200:
                last_answer = time.monotonic()
                if not published:
                    if self.shared is not None and (error := self.put_to_sleep(engine)):
                        return f"did not go to sleep: {error}"
                    rendezvous.publish(self.folder, engine)
                    starting.close()
                    published = True
                    log.info("%s: ready after %.1f s", engine, last_answer - started)
            elif not published and now - started > self.limits.start_timeout_s:
                return f"not ready {self.limits.start_timeout_s:g} s after its start"
            elif published and now - last_answer > self.limits.health_timeout_s:
                return f"no answer to health checks for {self.limits.health_timeout_s:g} s"
        return ""

    def put_to_sleep(self, engine: Engine) -> str:
        """Let a new engine give its GPU memory back; returns what went wrong, "" if nothing."""
        timeout_s = self.limits.start_timeout_s
        body = msgspec.json.encode(SleepRequest(self.sleep_level, timeout_s))
        status, answer = ask(engine, read_secret(self.folder / SECRET), "POST", SLEEP, body, timeout_s + 10)
        return msgspec.json.decode(answer, type=TurnReport).error if status == 200 else f"HTTP status {status}"


def probe(engine: Engine, secret: str) -> int:
    """The HTTP status of the engine's answer, 200 if its core answers too; 0 if there is none."""
    return ask(engine, secret, "GET", STATUS, b"", PROBE_TIMEOUT_S)[0]


def ask(engine: Engine, secret: str, method: str, route: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    """HTTP status and body of the engine's answer; 0 if there is none, or not from a holder of the secret."""
    call = Call(method, route, engine.place, digest_of(body))
    connection = http.client.HTTPConnection(engine.address, engine.port, timeout=timeout_s)
    try:
        connection.request(method, route, body, headers=call.headers(secret))
        answer = connection.getresponse()
        is_proved = call.is_proved(secret, answer.getheader(PROOF_HEADER, ""))
        return (answer.status, answer.read()) if is_proved else (0, b"")
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def kill_group(process: engine_command.Started, grace_s: float) -> None:
    """End a process that leads its own group, and all of that group; politely first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def run(slots: list[Slot], stopping: threading.Event, shared: NodeFolder | None = None) -> int:
    """Keep all engines of this node until stopping is set; returns DONE then, FAILED if one was given up.

    shared: what a killed trainer leaves there is removed.
    """
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
            if shared is not None:
                shared.drop_orphans()
    if shared is not None:
        shared.close()
    return FAILED if failures else DONE
