"""The command line and environment of one engine: vLLM's own HTTP server with this project's middleware, scheduler
and weight receiver plugged in."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config import EngineConfig
from megatron_vcppo.run.processes import die_with_parent, without_trainer
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
"""No network look-ups, no telemetry, no line of log per request."""


HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""A push touches fresh memory several times its size; page by page that costs as much as the rest of the push."""

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
    server = "vllm.entrypoints.openai.api_server" if on_gpu else "megatron_vcppo.rollout.engine_main"
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
    variables.update(VLLM_CPU_KVCACHE_SPACE=str(engine.cpu_cache_gib), TORCHDYNAMO_DISABLE="1")
    variables["GLIBC_TUNABLES"] = ":".join(filter(None, (base.get("GLIBC_TUNABLES"), HUGE_PAGES)))
    cpus = placement.cpus or tuple(sorted(os.sched_getaffinity(0)))
    if engine.tp == 1:
        # The model runs in the engine's core process: one process and one hop of every step fewer.
        threads = max(1, len(cpus) // engine.dp)
        variables.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        variables.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
    else:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = bind(cpus, engine.tp)
    return variables


def bind(cpus: Sequence[int], num_workers: int) -> str:
    """vLLM's notation for "worker k runs on these CPUs": shares of cpus, separated by bars; shared if too few."""
    shares = [cpus[k::num_workers] or [cpus[k % len(cpus)]] for k in range(num_workers)]
    return "|".join(",".join(map(str, share)) for share in shares)


def start(arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start an engine that dies with this process and writes to log (appended)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
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
