"""The command line and environment of one engine: vLLM's own HTTP server with this project's middleware, scheduler
and weight receiver plugged in."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from megatron_vcppo.config import EngineConfig
from megatron_vcppo.config.engine_environment import QUIET, cpu_engine_environment
from megatron_vcppo.errors import DONE, FAILED
from megatron_vcppo.rollout import engine_sockets
from megatron_vcppo.rollout.auth import PLACE_VARIABLE
from megatron_vcppo.run.processes import die_with_parent, exit_code, show_command, without_trainer
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE

CPU_SERVER = "megatron_vcppo.rollout.engine_main"
CPU_BATCH_TOKENS = 8192
"""Tokens that an engine without accelerators prefills at once."""


@dataclass(frozen=True)
class Placement:
    """The devices that one engine gets."""

    gpus: tuple[str, ...] = ()
    """Names as CUDA_VISIBLE_DEVICES has them: indices, GPU-… or MIG-…."""
    cpus: tuple[int, ...] = ()


def command(
    model: Path,
    engine: EngineConfig,
    *,
    dtype: str,
    max_length: int,
    address: str,
    port: int,
    on_gpu: bool,
    seed: int,
    sleeps: bool = False,
    has_weights: bool = True,
    returns_experts: bool = False,
) -> list[str]:
    """Arguments that start one engine. The secret is not among them: anyone may list a process's arguments.

    sleeps: it gives its GPU memory back between turns. Without GPUs vLLM refuses the option, and needs none to be told.
    has_weights: whether the model's folder has them; without, the engine starts with others until the first push.
    returns_experts: it can send the experts that its routers choose. Without GPUs that costs the prefix cache.
    """
    options = {
        "--model": str(model),
        "--served-model-name": "policy",
        "--host": address,
        "--port": str(port),
        "--dtype": dtype,
        "--max-model-len": str(max_length),
        "--max-num-seqs": str(engine.max_num_seqs),
        "--tensor-parallel-size": str(engine.tp),
        "--data-parallel-size": str(engine.dp),
        "--gpu-memory-utilization": str(engine.gpu_memory_utilization),
        "--seed": str(seed),
        "--logprobs-mode": "processed_logprobs",
        "--middleware": "megatron_vcppo.rollout.middleware.Middleware",
        "--scheduler-cls": "megatron_vcppo.rollout.final_output.FinalOutputScheduler",
        "--worker-extension-cls": "megatron_vcppo.rollout.engine_worker.WorkerExtension",
        "--weight-transfer-config": json.dumps({"backend": "vcppo"}),
        "--uvicorn-log-level": "warning",
    }
    switches = ["--disable-log-stats", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if not has_weights:
        options["--load-format"] = "dummy"
    if sleeps and on_gpu:
        switches.append("--enable-sleep-mode")
    if engine.enforce_eager or not on_gpu:
        switches.append("--enforce-eager")
    if not on_gpu:
        # A prompt that is prefilled in parts rewinds its seeded generator, which torch's CPU generators cannot do.
        options["--max-num-batched-tokens"] = str(max(max_length, CPU_BATCH_TOKENS))
        switches.append("--no-enable-chunked-prefill")
        if engine.tp == 1:
            options["--distributed-executor-backend"] = "uni"
    if returns_experts and on_gpu:
        switches.append("--enable-return-routed-experts")
    elif returns_experts:
        options["--worker-cls"] = "megatron_vcppo.rollout.routed_experts.CapturingWorker"
        options["--scheduler-cls"] = "megatron_vcppo.rollout.routed_experts.CapturingScheduler"
        switches.append("--no-enable-prefix-caching")
    arguments = [text for option in options.items() for text in option]
    server = "vllm.entrypoints.openai.api_server" if on_gpu else CPU_SERVER
    return [sys.executable, "-m", server, *arguments, *switches, *engine.extra_args]


def environment(
    base: Mapping[str, str], engine: EngineConfig, placement: Placement, secret_file: Path, address: str
) -> dict[str, str]:
    """The engine's environment: nothing of the trainer's world, its own devices, the place of the secret.

    address: of this node; vLLM would look for one by the route to a host of the internet.
    """
    variables = {**without_trainer(base), **QUIET, SECRET_FILE_VARIABLE: str(secret_file), "VLLM_HOST_IP": address}
    if placement.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(placement.gpus)
        return variables
    cpus = placement.cpus or tuple(sorted(os.sched_getaffinity(0)))
    variables |= cpu_engine_environment(engine, len(cpus), base)
    if engine.tp > 1:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = bind(cpus, engine.tp)
    return variables


def bind(cpus: Sequence[int], num_workers: int) -> str:
    """vLLM's notation for "worker k runs on these CPUs": shares of cpus, separated by bars; shared if too few."""
    shares = [cpus[k::num_workers] or [cpus[k % len(cpus)]] for k in range(num_workers)]
    return "|".join(",".join(map(str, share)) for share in shares)


SETTABLE = {SECRET_FILE_VARIABLE, PLACE_VARIABLE, "VLLM_HOST_IP", engine_sockets.VARIABLE}
"""Variables that an engine may have, and what it is forked from not: nothing reads them at its import."""


class Started(Protocol):
    """The engine's process, which leads a session: a part of Popen."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, -n after signal n; None while it runs."""

    def wait(self, timeout: float) -> int:
        """Until it has ended; raises subprocess.TimeoutExpired."""


def start(arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> Started:
    """Start an engine that dies with this process and writes to log (appended).

    It is forked, where this process has been forked from one that has imported the engine's libraries in the same
    environment (run/preloaded.py).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        if is_preloaded(arguments, variables):
            return ForkedEngine(arguments, variables, output.fileno())
        return subprocess.Popen(
            arguments,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,
            start_new_session=True,
            cwd=os.getcwd(),
        )


def is_preloaded(arguments: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Whether this process has imported, in an engine's environment, what these arguments run."""
    names = os.environ.keys() | variables.keys()
    differing = {name for name in names if os.environ.get(name) != variables.get(name)}
    return CPU_SERVER in sys.modules and arguments[2] == CPU_SERVER and differing <= SETTABLE


class ForkedEngine:
    """The server as a fork of this process."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], output: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._serve(arguments, variables, output)

    def _serve(self, arguments: Sequence[str], variables: Mapping[str, str], output: int) -> NoReturn:
        """In the engine. What forked it is a thread, so that the interpreter would not end with it."""
        code = FAILED
        try:
            os.setsid()
            die_with_parent()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            show_command(arguments)
            logging.getLogger().handlers.clear()
            os.environ.clear()
            os.environ.update(variables)
            sys.argv = [*arguments[2:]]
            sys.modules[CPU_SERVER].main()
            code = DONE
        except SystemExit as end:
            code = exit_code(end)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # whatever happens: this must not continue as a second supervisor
                os._exit(code)

    def poll(self) -> int | None:
        """See Started."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """See Started."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"engine {self.pid}", timeout)
            time.sleep(0.02)
        return code
