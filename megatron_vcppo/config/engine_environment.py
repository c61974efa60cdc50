"""Variables of an engine that are the same for all engines of a node, some of which libraries read at their import."""

from collections.abc import Mapping

from megatron_vcppo.config.sections.rollout import EngineConfig

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


def cpu_engine_environment(engine: EngineConfig, num_cpus: int, base: Mapping[str, str]) -> dict[str, str]:
    """Of an engine without accelerators on this many CPUs. base: the environment to which it is added."""
    variables = {**QUIET, "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_cache_gib), "TORCHDYNAMO_DISABLE": "1"}
    tunables = [text for text in base.get("GLIBC_TUNABLES", "").split(":") if text and text != HUGE_PAGES]
    variables["GLIBC_TUNABLES"] = ":".join([*tunables, HUGE_PAGES])
    if engine.tp == 1:
        # The model runs in the engine's core process: one process and one hop of every step fewer.
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        variables |= {"OMP_NUM_THREADS": str(max(1, num_cpus // engine.dp)), "OMP_WAIT_POLICY": "PASSIVE"}
    return variables
