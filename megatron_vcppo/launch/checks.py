"""Checks that need files: data, the model and the run folder. Rules between keys are in config/rules/."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES, trainer_ranks
from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.data.named_sources import check_named, named_source
from megatron_vcppo.data.readers import check_source
from megatron_vcppo.data.vocabulary import check_vocabulary
from megatron_vcppo.errors import UserError, storage_error
from megatron_vcppo.hf.adapters import check_model
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.folders import iteration_folder, small_files
from megatron_vcppo.hf.reward_model import check_reward_model, uses_reward_model
from megatron_vcppo.launch.memory_plan import OVERHEAD_GIB, check_memory
from megatron_vcppo.rewards.tools import check_tools
from megatron_vcppo.run.folder import RunFolder


def check_inputs(config: Config, stages: Sequence[str]) -> dict[str, float]:
    """Everything that these stages read from outside the configuration: data files, verifiers, the model, its
    tokenizer and memory.

    Every command that starts stages calls it (``commands.arguments.checked_stages``) before it writes anything.
    Returns the estimated GiB per rank of each stage. Raises UserError with the key and what is wrong.
    """
    check_critics(config, stages)
    _check_data(config, stages)
    if not set(stages).isdisjoint(ENGINE_STAGES) and (config.prompts.verifiers or config.rewards.code.checkers):
        from megatron_vcppo.rewards.registry import check_names  # imports sympy: half a second

        check_names(config.prompts.verifiers, config.rewards.code)
    if not set(stages).isdisjoint(ENGINE_STAGES):
        check_tools(config.prompts.tools)
    arch = Architecture.from_hf(config.model.hf)
    check_vocabulary(Path(config.model.hf))
    small_files(Path(config.model.hf))  # every checkpoint gets them: refused now, not at the first save
    _check_weights(config)
    if "export" in stages and config.export.critic:
        try:
            arch.check_exportable("critic")
        except UserError as error:
            raise UserError(f"export.critic: {error}") from None
    if set(stages) - {"export"}:
        arch.check_length(config.model.max_length)
    check_kind_of_model(arch, config, stages)
    for stage in stages:
        parallel = stage_config(config, stage).parallel
        arch.check_parallel(parallel.tp, parallel.pp, parallel.ep, parallel.sequence_parallel, parallel.ends)
    if any(uses_reward_model(config, stage) for stage in stages):
        check_reward_model(config)
    needs = check_memory(arch, config, list(stages))
    if config.cluster.name == LOCAL:
        check_this_machine(config, needs, machine_gib())
    return needs


def check_kind_of_model(arch: Architecture, config: Config, stages: Sequence[str]) -> None:
    """UserError if the configuration asks for what this kind of model does not have. Needs only its config.json."""
    check_model(arch, config.model.lora)
    if "ppo" in stages and config.ppo.routing_replay and arch.experts is None:
        raise UserError(
            f"ppo.routing_replay is for mixtures of experts, and {config.model.hf} has none: set it to false"
        )


def machine_gib() -> float:
    """Main memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def check_this_machine(config: Config, needs: Mapping[str, float], gib: float) -> None:
    """UserError if the ranks of a stage need more than this machine's main memory: it would stand still long before one
    is killed. needs: GiB per rank of each stage. gib: what there is."""
    for stage, need in needs.items():
        own = stage_config(config, stage)
        if stage == "export" or own.cluster.gpus_per_node:
            continue
        ranks, model_gib = trainer_ranks(own), need - OVERHEAD_GIB
        if ranks * model_gib > gib:
            raise UserError(
                f"{stage} needs about {ranks * model_gib:.0f} GiB of main memory on this machine ({model_gib:.1f} for "
                f"each of {ranks} ranks), there are {gib:.0f}: choose a cluster (--cluster), a smaller model, or "
                "fewer replicas (parallel.dp)"
            )


def _check_weights(config: Config) -> None:
    """UserError if what model.weights names is not there; loading it checks every tensor."""
    if config.model.weights is not None:
        try:
            iteration_folder(Path(config.model.weights))
        except UserError as error:
            raise UserError(f"model.weights: {error}") from None


def check_critics(config: Config, stages: Sequence[str]) -> None:
    """UserError if a critic, or the reward model, comes from a stage that is neither earlier in the chain nor done in
    the run folder."""
    run, chain = RunFolder.of(config), [str(stage) for stage in config.stages]
    starts: list[tuple[str, str, str]] = []
    if config.rewards.model.stage is not None:
        starts += [
            ("rewards.model.stage", rewarded, config.rewards.model.stage)
            for rewarded in stages
            if uses_reward_model(config, rewarded)
        ]
    if "value_pretrain" in stages:
        starts.append(("value_pretrain.init", "value_pretrain", config.value_pretrain.init))
    if "ppo" in stages and config.ppo.advantage.baseline == "critic":
        starts.append(("ppo.critic.init", "ppo", config.ppo.critic.init))
    for key, stage, init in starts:
        before = init in chain[: chain.index(stage)]
        if init in ("value_pretrain", "reward_model") and not before and not run.stage(init).marked_done():
            raise UserError(
                f"{key} {init} needs stage {init}, which is neither before {stage} in stages ({', '.join(chain)}) nor "
                f"done in {config.run.dir}: add it to stages, or change {key}"
            )


def _check_data(config: Config, stages: Sequence[str]) -> None:
    named = {"sft.train": config.sft.train, "sft.validation": config.sft.validation} if "sft" in stages else {}
    if not set(stages).isdisjoint(ENGINE_STAGES):
        named["prompts.train"] = config.prompts.train
        named |= {f"prompts.mix.{source}": source for source in config.prompts.mix}
    if "evaluate" in stages or ("ppo" in stages and config.ppo.evaluate_every):
        named["prompts.test"] = config.prompts.test
    for key, source in named.items():
        if source:
            try:
                if problems := named_source(source):
                    check_named(problems, held_out=key == "prompts.test")
                    source = problems.file
                if source:
                    check_source(source)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None


def check_run_folder(run: RunFolder) -> None:
    """Make the run folder. UserError if it cannot be written."""
    run.make()
    probe = run.path / ".write_test"
    try:
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        if found := storage_error(error, str(run.path), "run the same command again"):
            raise found from None
        raise UserError(f"run.dir {run.path}: cannot be written: {error.strerror}") from None
