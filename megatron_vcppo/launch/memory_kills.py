"""Kills by the kernel for want of main memory: whether a killed role was one, and what to lower.

On this machine the kernel's own count of such kills tells; on a cluster the messages of slurmstepd and srun do, which
read the count of the job's cgroup.
"""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import SIGNALLED, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.controller import Outcome
from megatron_vcppo.launch.memory_plan import check_memory
from megatron_vcppo.launch.role_commands import starts_engines, trainer_layout

OF_SLURM = re.compile(r"oom[_-]kill|OOM Killed|Out Of Memory", re.IGNORECASE)
COUNTER = Path("/proc/vmstat")


def oom_kills() -> int:
    """How many processes of this machine the kernel has killed for memory since it started; 0 if it does not say."""
    with suppress(OSError, ValueError):
        for line in COUNTER.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def named(outcome: Outcome, config: Config, stage: str, kills_before: int) -> Outcome:
    """The outcome, with memory as its cause if it was. kills_before: ``oom_kills`` at the attempt's start."""
    if outcome.code <= SIGNALLED:
        return outcome
    if oom_kills() == kills_before and not OF_SLURM.search("\n".join([outcome.cause, *outcome.details])):
        return outcome
    return replace(outcome, cause=f"{outcome.cause}: out of main memory; {advice(config, stage)}")


def advice(config: Config, stage: str) -> str:
    """What the stage's ranks need by the plan, what its job requested, and what to change."""
    own = stage_config(config, stage)
    _, ranks = trainer_layout(own, stage)
    limit = own.cluster.memory_per_node_gb
    requested = f"of {limit:g} GB requested" if limit else "of the node's (cluster.memory_per_node_gb is not set)"
    planned = ""
    with suppress(UserError):
        gib = check_memory(Architecture.from_hf(config.model.hf), config, [stage])[stage]
        where = "on its GPU" if own.cluster.gpus_per_node else "of it"
        planned = f"the plan counts {gib:.1f} GiB {where} for each of {ranks} ranks per node, "
    lower = ["checkpoint.async_save (a copy of the state in main memory)"]
    if starts_engines(own, stage):
        lower += ["prompts.verify_workers, prompts.verify_memory_mib"]
    return f"{planned}{requested}: request more, or lower {', '.join(lower)}, the ranks per node"
