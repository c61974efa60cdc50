"""What a chain will need: memory, time of each phase and stage, GPU-hours, disk; and a layout that fits. Pure.

Times are estimates from the section ``hardware``; docs/slurm.md has the formulas.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_vcppo.config import CheckpointConfig, Config, ParallelConfig
from megatron_vcppo.config.placement import ENGINE_STAGES, data_parallel_size, engine_placement, trainer_ranks
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import adapter_parameters
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.pipeline import stage_layers
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.launch.engine_estimate import EngineEstimate, estimate_engines, generation_s, response_tokens
from megatron_vcppo.launch.memory_plan import ASLEEP_GIB, WEIGHT_BYTES, frozen_parameters, models_of, plan
from megatron_vcppo.launch.push_estimate import PushEstimate, estimate_push
from megatron_vcppo.launch.role_commands import trainer_layout

CHECKPOINT_BYTES = {"bfloat16": 14, "float32": 12}
"""Of a parameter: weights, main parameters and two moments."""
ROLLOUT_BYTES_PER_TOKEN = 12.5
"""Stored: 4 bytes each of token id and log-prob, and text; as measured on 8,192-token responses."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. Times are in seconds."""

    stage: str
    nodes: int
    ranks: int
    memory_gib: dict[str, float]
    """By part, on the fullest rank."""
    limit_gib: float | None
    fits: bool
    better: tuple[str, ...]
    """If it does not fit: the nearest layout that does, as key=value; empty if none does."""
    engines: EngineEstimate | None
    push: PushEstimate | None
    steps: int | None
    """Iterations of PPO, optimizer steps of other stages; None: not known from the configuration."""
    phases_s: dict[str, float]
    """Of one step."""
    once_s: dict[str, float]
    """Of the whole stage, once."""
    checkpoints_gb: float
    rollouts_gb: float
    stage_layers: tuple[int, ...]
    """Of each pipeline stage."""

    @property
    def step_s(self) -> float:
        """Of one step, all phases after one another."""
        return sum(self.phases_s.values())

    @property
    def hours(self) -> float | None:
        """Of the stage."""
        if self.steps is None:
            return None
        return (self.steps * self.step_s + sum(self.once_s.values())) / 3600


def plan_chain(arch: Architecture, config: Config, stages: list[str]) -> list[StagePlan]:
    """One plan per stage."""
    return [plan_stage(arch, stage_config(config, stage), stage) for stage in stages]


def plan_stage(arch: Architecture, config: Config, stage: str) -> StagePlan:
    """config: the stage's own, with its overrides in their sections."""
    nodes, per_node = trainer_layout(config, stage)
    generates = stage in ENGINE_STAGES
    memory = plan(arch, config, stage) if stage != "export" else {}
    limit, engines = memory_limit(config, stage), estimate_engines(arch, config) if generates else None
    fits = (limit is None or sum(memory.values()) <= limit) and (engines is None or engines.concurrency > 0)
    better = () if fits or limit is None else nearest_layout(arch, config, stage, limit)
    push = estimate_push(arch, config) if generates else None
    steps, phases, once = times(arch, config, stage)
    return StagePlan(
        stage=stage,
        nodes=nodes + (config.cluster.rollout_nodes if generates else 0),
        ranks=nodes * per_node,
        memory_gib=memory,
        limit_gib=limit,
        fits=fits,
        better=better,
        engines=engines,
        push=push,
        steps=steps,
        phases_s=phases,
        once_s=once,
        checkpoints_gb=checkpoints_gb(arch, config, stage),
        rollouts_gb=rollouts_gb(config, stage) + (experts_gb(arch, config) if stage == "ppo" else 0.0),
        stage_layers=stage_layers(arch.num_layers, config.parallel.pp, config.parallel.ends),
    )


def memory_limit(config: Config, stage: str) -> float | None:
    """GiB that the trainer may take of a GPU; None: not known."""
    limit = config.cluster.gpu_memory_gib
    if limit and stage in ENGINE_STAGES and engine_placement(config) == "trainer_gpus":
        return limit - ASLEEP_GIB
    return limit


def nearest_layout(arch: Architecture, config: Config, stage: str, limit_gib: float) -> tuple[str, ...]:
    """The layout on the same ranks that fits and changes the fewest keys; of those the one with most replicas, and of
    those the one whose experts are divided least."""
    fitting = []
    for parallel in layouts(config, arch.experts is not None):
        changed = tuple(
            f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in vars(parallel).items()
            if value != getattr(config.parallel, name)
        )
        try:
            arch.check_parallel(parallel.tp, parallel.pp, parallel.ep, parallel.sequence_parallel, parallel.ends)
            replicas = data_parallel_size(parallel, trainer_ranks(config))
        except UserError:
            continue
        if sum(plan(arch, replace(config, parallel=parallel), stage).values()) <= limit_gib:
            fitting.append((len(changed), -replicas, parallel.ep, changed))
    return min(fitting)[-1] if fitting else ()


def layouts(config: Config, has_experts: bool = False) -> Iterator[ParallelConfig]:
    """Layouts of the same ranks, with tp inside a node."""
    now, ranks = config.parallel, trainer_ranks(config)
    per_node = ranks // config.cluster.trainer_nodes
    powers = [1 << exponent for exponent in range(ranks.bit_length())]
    sizes_of_experts = sorted({*powers, now.ep}) if has_experts else [now.ep]
    for tp, pp, cp, ep in itertools.product(
        sorted({*powers, now.tp}), sorted({*powers, now.pp}), sorted({*powers, now.cp}), sizes_of_experts
    ):
        if tp > per_node or tp * pp * cp > ranks or (pp == 1 and now.ends != (None, None)):
            continue
        for optimizer, recompute in itertools.product({now.distributed_optimizer, True}, {now.recompute, "full"}):
            sequence = (now.sequence_parallel or has_experts) and tp > 1
            sizes: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": now.dp and ranks // (tp * pp * cp)}
            yield replace(
                now, **sizes, distributed_optimizer=optimizer, recompute=recompute, sequence_parallel=sequence
            )


def times(arch: Architecture, config: Config, stage: str) -> tuple[int | None, dict[str, float], dict[str, float]]:
    """(steps, seconds of a step by phase, seconds of what happens once by phase)."""
    if stage == "sft":
        settings = config.sft
        phases = {"update": pass_s(arch, config, settings.batch_size, training=True, optimizer_steps=1)}
        return settings.steps, phases | saving(arch, config, stage, settings.checkpoint), {}
    samples = config.rollout.num_samples
    if stage == "reward_model":
        rm = config.reward_model
        once = {"push": estimate_push(arch, config).seconds}
        once["generation"] = generation_s(arch, config, rm.num_prompts * samples)
        phases = {"update": pass_s(arch, config, rm.batch_size, training=True, optimizer_steps=1)}
        return rm.steps, phases | saving(arch, config, stage, rm.checkpoint), once
    if stage == "value_pretrain":
        vp = config.value_pretrain
        fresh = vp.rollouts == "fresh"
        generation = {"generation": generation_s(arch, config, vp.batch_size if fresh else vp.stored_rollouts)}
        phases = {
            "values": pass_s(arch, config, vp.batch_size, training=False),
            "update": pass_s(arch, config, vp.batch_size, training=True, optimizer_steps=1),
        }
        phases |= saving(arch, config, stage, vp.checkpoint)
        once = {"push": estimate_push(arch, config).seconds}
        return (vp.steps, generation | phases, once) if fresh else (vp.steps, phases, once | generation)
    if stage == "ppo":
        return config.ppo.iterations, _ppo_phases(arch, config), {}
    if stage == "evaluate" and config.evaluate.num_prompts:
        responses = config.evaluate.num_prompts * config.evaluate.num_samples
        once = {"push": estimate_push(arch, config).seconds, "generation": generation_s(arch, config, responses)}
        return 0, {}, once
    if stage == "export":
        gb = arch.parameter_count() * (CHECKPOINT_BYTES[config.model.dtype] + WEIGHT_BYTES[config.model.dtype]) / 1e9
        return 0, {}, {"files": gb / config.hardware.disk_gb_per_s}
    return None, {}, {}


def _ppo_phases(arch: Architecture, config: Config) -> dict[str, float]:
    ppo = config.ppo
    rollouts = ppo.prompts_per_iteration * config.rollout.num_samples
    trained, reference = models_of(config, "ppo")
    has_critic = "critic" in trained
    passes = ppo.ppo_epochs * (1 + (ppo.critic.updates_per_actor_update if has_critic else 0))
    forward = pass_s(arch, config, rollouts, training=False)
    phases = {
        "push": estimate_push(arch, config).seconds,
        "generation": generation_s(arch, config, rollouts, ppo.window_tokens),
        "logprobs": forward * ((ppo.loss.kind == "clip") + len(reference)),
        "values": forward if has_critic else 0.0,
        "update": passes * pass_s(arch, config, rollouts, training=True, optimizer_steps=ppo.minibatches),
        **saving(arch, config, "ppo", ppo.checkpoint),
        **_evaluating(arch, config),
    }
    if ppo.staleness:  # generation and training overlap: what is shorter is hidden
        training = phases["logprobs"] + phases["values"] + phases["update"]
        phases["generation"] = max(0.0, phases["generation"] - training)
    return phases


def _evaluating(arch: Architecture, config: Config) -> dict[str, float]:
    """Seconds per iteration that evaluations on the live engines take on average: a push and responses to the held-out
    problems, which engines generate as those of training; empty if there are none, or their number is not known."""
    ppo, evaluate = config.ppo, config.evaluate
    if not ppo.evaluate_every or not evaluate.num_prompts:
        return {}
    responses = evaluate.num_prompts * evaluate.num_samples
    one = estimate_push(arch, config).seconds + generation_s(arch, config, responses)
    return {"evaluation": one * (ppo.iterations // ppo.evaluate_every) / ppo.iterations}


def pass_s(arch: Architecture, config: Config, sequences: int, *, training: bool, optimizer_steps: int = 1) -> float:
    """Seconds of one pass of one model over so many sequences of mean length, forward or forward and backward.

    A recomputed forward pass costs a third more; frozen weights below adapters have no gradients, a third less. The
    pipeline idles while it fills and drains, once per optimizer step, and waits for the stage with the most layers.
    """
    parallel, hardware = config.parallel, config.hardware
    length = min(hardware.prompt_tokens + response_tokens(config), config.model.max_length)
    ranks = trainer_ranks(config)
    flops = float(arch.training_flops([length])) * sequences
    thirds = 1 if not training else 3 if config.model.lora.rank is None else 2
    flops *= (thirds + (training and parallel.recompute == "full")) / 3
    replicas = ranks // (parallel.tp * parallel.pp * parallel.cp)
    at_once = ceil_div(sequences, replicas * optimizer_steps) * length
    microbatches = ceil_div(at_once, max(parallel.tokens_per_microbatch, length))
    bubble = 1 + (parallel.pp - 1) / microbatches
    bubble *= max(stage_layers(arch.num_layers, parallel.pp, parallel.ends)) * parallel.pp / arch.num_layers
    return flops * bubble / (ranks * hardware.tflops * 1e12 * hardware.mfu)


def saving(arch: Architecture, config: Config, stage: str, checkpoint: CheckpointConfig) -> dict[str, float]:
    """Seconds per step that saving takes on average; none where it is asynchronous."""
    if checkpoint.async_save:
        return {}
    return {"saving": checkpoint_gb(arch, config, stage) / config.hardware.disk_gb_per_s / checkpoint.save_every}


def checkpoint_gb(arch: Architecture, config: Config, stage: str) -> float:
    """One checkpoint of a stage, all its components; of frozen parameters it has the weights alone, of models with
    adapters the adapters alone."""
    trained, _ = models_of(config, stage)
    every, weight = (size[config.model.dtype] for size in (CHECKPOINT_BYTES, WEIGHT_BYTES))
    lora = config.model.lora
    count = arch.parameter_count() if lora.rank is None else adapter_parameters(arch, lora)
    frozen = sum(frozen_parameters(arch, config, stage))
    return (len(trained) * count * every - frozen * (every - weight)) / 1e9


def checkpoints_gb(arch: Architecture, config: Config, stage: str) -> float:
    """Most that the stage's checkpoints take on disk: those that are kept, and one that is being written."""
    settings = getattr(getattr(config, stage), "checkpoint", None)
    if stage == "export":
        return arch.parameter_count() * WEIGHT_BYTES[config.export.dtype or config.model.dtype] / 1e9
    if settings is None:
        return 0.0
    steps, _, _ = times(arch, config, stage)
    kept = settings.keep_last or ceil_div(steps or settings.save_every, settings.save_every)
    if settings.keep_best.metric is not None:
        kept += settings.keep_best.count
    if settings.keep_every:
        kept += (steps or 0) // settings.keep_every
    return (kept + 1) * checkpoint_gb(arch, config, stage)


def rollouts_gb(config: Config, stage: str) -> float:
    """What the stage's stored rollouts take."""
    samples, vp = config.rollout.num_samples, config.value_pretrain
    count = {
        "reward_model": config.reward_model.num_prompts * samples,
        "value_pretrain": vp.steps * vp.batch_size if vp.rollouts == "fresh" else vp.stored_rollouts,
        "ppo": config.ppo.iterations * config.ppo.prompts_per_iteration * samples,
        "evaluate": (config.evaluate.num_prompts or 0) * config.evaluate.num_samples,
    }.get(stage, 0)
    return count * response_tokens(config) * ROLLOUT_BYTES_PER_TOKEN / 1e9


def experts_gb(arch: Architecture, config: Config) -> float:
    """Most that the experts for routing replay take: of iterations that the oldest checkpoint is not past."""
    if arch.experts is None or not config.ppo.routing_replay:
        return 0.0
    settings, ppo = config.ppo.checkpoint, config.ppo
    kept = settings.save_every * (settings.keep_last + 1) if settings.keep_last else ppo.iterations
    row_bytes = arch.num_layers * arch.experts.per_token * arch.experts.number_bytes
    tokens = config.hardware.prompt_tokens + response_tokens(config)
    count = min(kept, ppo.iterations) * ppo.prompts_per_iteration * config.rollout.num_samples
    return count * tokens * row_bytes / 1e9
