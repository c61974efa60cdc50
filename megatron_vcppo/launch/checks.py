"""What can be known to be wrong before a job is queued."""

from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.checks import trainer_ranks
from megatron_vcppo.config.placement import ENGINE_STAGES
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.memory_plan import check_memory
from megatron_vcppo.run.folder import RunFolder


def check_layout(config: Config) -> None:
    """Parallel sizes against nodes and GPUs."""
    cluster, parallel = config.cluster, config.parallel
    ranks_per_node = trainer_ranks(config) // cluster.trainer_nodes
    if cluster.gpus_per_node and ranks_per_node > cluster.gpus_per_node:
        raise UserError(
            f"{ranks_per_node} trainer ranks per node need as many GPUs; cluster.gpus_per_node is "
            f"{cluster.gpus_per_node}"
        )
    if parallel.tp > ranks_per_node:
        raise UserError(
            f"parallel.tp {parallel.tp} would span nodes: only {ranks_per_node} ranks are on each of "
            f"{cluster.trainer_nodes} trainer nodes: lower it to at most {ranks_per_node} (and raise parallel.pp)"
        )
    if not cluster.gpus_per_node and ranks_per_node > cluster.cpus_per_node:
        raise UserError(f"{ranks_per_node} ranks per node but cluster.cpus_per_node is {cluster.cpus_per_node}")
    unknown = set(cluster.stage_time_limit_minutes) - set(config.stages)
    if unknown:
        raise UserError(f"cluster.stage_time_limit_minutes names no stage of this chain: {', '.join(sorted(unknown))}")


def check_inputs(config: Config, stages: list[str]) -> dict[str, float]:
    """Data files, the model's architecture and its memory; returns the estimated GiB per rank of each stage."""
    named = {"sft.train": config.sft.train, "sft.validation": config.sft.validation} if "sft" in stages else {}
    if set(stages) & set(ENGINE_STAGES):
        named["prompts.train"] = config.prompts.train
    if "evaluate" in stages or ("ppo" in stages and config.ppo.evaluate_every):
        named["prompts.test"] = config.prompts.test
    for key, source in named.items():
        is_path = source is not None and (source.endswith((".json", ".jsonl")) or source.startswith(("/", ".", "~")))
        if source and is_path and not Path(source).exists():
            raise UserError(f"{key}: {source} does not exist")
    if set(stages) & set(ENGINE_STAGES) and (config.prompts.verifiers or config.rewards.code.checkers):
        from megatron_vcppo.rewards.registry import check_names  # imports sympy: half a second

        check_names(config.prompts.verifiers, config.rewards.code)
    arch = Architecture.from_hf(config.model.hf)
    arch.check_parallel(config.parallel.tp, config.parallel.pp)
    return check_memory(arch, config, stages)


def check_run_folder(run: RunFolder) -> None:
    """Make the run folder. UserError if it cannot be written."""
    run.make()
    probe = run.path / ".write_test"
    try:
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.dir {run.path}: cannot be written: {error.strerror}") from None
