"""A first configuration for a model, data and a cluster: YAML whose comments are the texts of the keys."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from megatron_vcppo.config import Config
from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.placement import data_parallel_size, engine_placement, trainer_ranks
from megatron_vcppo.data.fields import find
from megatron_vcppo.data.readers import Row, check_source, read_samples
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.engine_estimate import estimate_engines
from megatron_vcppo.launch.memory_plan import check_memory

PROMPTS = ("prompt", "question", "problem", "instruction", "query")
RESPONSES = ("response", "completion", "output", "generation")
ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth", "solution", "label")
MAX_LENGTH = 4096
"""Tokens, where the model has more positions: a first run should not need a cluster of its own."""
SIZES = (1, 2, 4, 8)
LAYOUTS = [(tp, ep, recompute) for recompute in ("none", "full") for ep in SIZES for tp in SIZES]
"""(tensor-parallel size, expert-parallel size, recomputation), the cheapest first."""


def first_values(model: str, data: str, test: str | None, cluster: Config, run_dir: str) -> dict[str, Any]:
    """Dotted key → value, by what the first sample of ``data`` has.

    A response (or a chat) gives SFT; a prompt with an answer gives VC-PPO from the model as it is. cluster: the
    defaults with the profile. UserError if the data is neither, or the model cannot be read.
    """
    arch = Architecture.from_hf(model)
    row = first_row(data)
    values: dict[str, Any] = {"run.dir": run_dir, "model.hf": model}
    prompt = first_key(row, PROMPTS)
    response, answer = first_key(row, RESPONSES), first_key(row, ANSWERS)
    length = min(MAX_LENGTH, arch.max_positions or MAX_LENGTH)
    values["model.max_length"] = length
    if find(row, "messages") is not None or (prompt and response):
        values |= {"stages": ["sft", "export"], "sft.train": data}
        values |= {"sft.validation": test} if test else {}
        values |= renamed("sft.prompt_key", prompt) | renamed("sft.response_key", response)
        values |= {"sft.epochs": 2, "sft.batch_size": 32, "sft.optimizer.lr": 1e-5}
    elif prompt and answer:
        values["stages"] = ["value_pretrain", "ppo", "export", *(["evaluate"] if test else [])]
        values |= {"prompts.train": data} | ({"prompts.test": test} if test else {})
        values |= renamed("prompts.prompt_key", prompt) | renamed("prompts.answer_key", answer)
        values |= {} if find(row, "task") is not None else {"prompts.task": "math"}
        values |= {"rollout.max_tokens": length * 3 // 4, "rollout.num_samples": 8}
        values |= {"value_pretrain.init": "random_head", "value_pretrain.steps": 100}
        values |= {"ppo.iterations": 100, "ppo.prompts_per_iteration": 128, "ppo.optimizer.lr": 1e-6}
        values |= {"ppo.critic.init": "value_pretrain", "ppo.checkpoint.save_every": 10}
    else:
        has = ", ".join(row) if isinstance(row, dict) else f"a list of {len(row)}"
        raise UserError(
            f"{data}: the first sample has {has}: expected a prompt ({', '.join(PROMPTS)}) with a response "
            f"({', '.join(RESPONSES)}), a chat (messages) or an answer ({', '.join(ANSWERS)}); see docs/tasks.md"
        )
    return values | layout(arch, values, cluster)


def first_row(data: str) -> Row:
    """The first sample. UserError if there is none that can be read."""
    check_source(data)
    sample = next(iter(read_samples(data)), None)
    if sample is None or sample.value is None:
        raise UserError(f"{data}: {'no samples' if sample is None else sample.problem}")
    return sample.value


def first_key(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of these names under which the sample has a value."""
    return next((name for name in names if find(row, name) is not None), None)


def renamed(key: str, found: str | None) -> dict[str, str]:
    """A field's key, where the data calls the field otherwise."""
    return {key: found} if found and found != all_keys()[key].default else {}


def layout(arch: Architecture, values: Mapping[str, Any], cluster: Config) -> dict[str, Any]:
    """Parallel sizes that fit the GPUs by the memory plan, and engines for them; nothing where there are no GPUs.

    UserError if no layout with tp and ep fits.
    """
    gpus, stages = cluster.cluster.gpus_per_node, list(values["stages"])
    if not gpus:
        return {}
    cluster.stages, cluster.model.max_length = stages, values["model.max_length"]
    for tp, ep, recompute in LAYOUTS:
        if gpus % tp or arch.num_heads % tp or arch.num_kv_heads % tp or (ep > 1 and arch.experts is None):
            continue
        found: dict[str, Any] = {"parallel.tp": tp, "parallel.recompute": recompute}
        found |= {"parallel.sequence_parallel": tp > 1, "parallel.distributed_optimizer": True, "parallel.ep": ep}
        for name, value in found.items():
            setattr(cluster.parallel, name.partition(".")[2], value)
        try:
            arch.check_parallel(tp, 1, ep, tp > 1)
            data_parallel_size(cluster.parallel, trainer_ranks(cluster))
            check_memory(arch, cluster, [stage for stage in stages if stage != "export"])
        except UserError:
            continue
        if ep == 1:
            del found["parallel.ep"]
        if "ppo" in stages:
            found |= engine_layout(arch, cluster, tp)
        return found
    kinds = "tensor and expert" if arch.experts else "tensor"
    raise UserError(
        f"{arch.parameter_count() / 1e9:.1f} billion parameters fit no layout with {kinds} parallelism on "
        f"{cluster.cluster.trainer_nodes} × {gpus} GPUs: give the profile more nodes (cluster.trainer_nodes), or "
        "take a smaller model; docs/slurm.md says what fits"
    )


def engine_layout(arch: Architecture, cluster: Config, tp: int) -> dict[str, Any]:
    """Tensor-parallel size of an engine, the trainer's or what its weights and cache need, and engines per node."""
    gpus = cluster.cluster.gpus_per_node
    free = gpus // 2 if engine_placement(cluster) == "trainer_nodes" else gpus
    engine, size = cluster.rollout.engine, min(tp, free)
    engine.tp = size
    while estimate_engines(arch, cluster).concurrency < 1 and 2 * size <= free and not arch.num_kv_heads % (2 * size):
        size *= 2
        engine.tp = size
    return {"rollout.engine.tp": size, "rollout.engine.per_node": max(1, free // size)}


def render(values: Mapping[str, Any], defaults: list[str], head: str) -> str:
    """The values as YAML, above each key the first sentence of its text."""
    lines = [f"# {line}" for line in head.splitlines()]
    if defaults:
        lines.append(f"defaults: {flow(defaults)}")
    before: list[str] = []
    for name, value in sorted_by_section(values):
        *sections, key = name.split(".")
        for depth, section in enumerate(sections):
            if before[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        before = sections
        indent = "  " * len(sections)
        lines += [f"{indent}# {line}" for line in textwrap.wrap(first_sentence(all_keys()[name].doc), 100)]
        lines.append(f"{indent}{key}: {flow(value)}")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=100_000)
    return text.removesuffix("...\n").strip()


def sorted_by_section(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """In the given order, but every section in one piece, its own keys before those of its sub-sections."""
    for section in dict.fromkeys(name.partition(".")[0] for name in values):
        inside = [name for name in values if name.partition(".")[0] == section]
        for name in sorted(inside, key=lambda name: (name.count("."), name.rpartition(".")[0])):
            yield name, values[name]


def first_sentence(text: str) -> str:
    """Example: "Slurm partition; null: the cluster's default." stays, later sentences go."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(text.split()))[0]
