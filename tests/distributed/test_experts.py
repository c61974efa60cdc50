"""A mixture of experts, with its routers' losses, trains as transformers' and as itself on one rank."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import balance, pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.model import build_actor, build_critic
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences
from tools.benchmarks._tiny_models import save_tiny_model

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.02}
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1)


def start(folder: Path, parallel: ParallelConfig, **model: Any) -> tuple[Actor, Critic]:
    runtime.start(parallel, seed=3, timeout_s=60)
    arch, config = Architecture.from_hf(folder), ModelConfig(hf=str(folder), **{"dtype": "float32", **model})
    actor, critic = build_actor(arch, config, parallel), build_critic(arch, config, parallel)
    load_hf(actor, folder)
    load_hf(critic, folder)
    return (
        Actor(actor, parallel, OPTIMIZER, ScheduleConfig(), total_steps=6),
        Critic(critic, parallel, OPTIMIZER, ScheduleConfig(), total_steps=6),
    )


def train(folder: Path, parallel: ParallelConfig, steps: int = 3) -> dict[str, list[float]]:
    """Losses, gradient norms and what the routers report of each step of both models; log-probs under new weights."""
    actor, critic = start(folder, parallel, **LOSSES)
    history: dict[str, list[float]] = {}
    for seed in range(steps):
        for name, learner in (("actor", actor), ("critic", critic)):
            for key, value in result_of(learner, parallel, seed).items():
                history.setdefault(f"{name} {key}", []).append(value)
    fixed = pack_all(make_sequences(99), budget(actor), *rounding(parallel))
    history["logprobs"] = [value for row in unpack_all(fixed, actor.logprobs(fixed)) for value in row.tolist()]
    weight = 1e-3 / actor.runtime.dp_size
    held_out = actor.evaluate(fixed, lambda outputs, m: ((outputs[0] * m.fields["loss_mask"]).sum() * weight, {}))
    return history | {"held out": [held_out["loss"]]}


def budget(learner: Actor | Critic) -> int:
    """Tokens of a micro-batch: the second replica has more micro-batches than the first."""
    return 160 if learner.runtime.dp_rank == 0 else 90


def result_of(learner: Actor | Critic, parallel: ParallelConfig, seed: int) -> dict[str, float]:
    sequences = make_sequences(seed)
    total = sum(sum(s.fields["loss_mask"]) for s in sequences)

    def loss(outputs, microbatch):
        mask = microbatch.fields["loss_mask"].float()
        error = -outputs[0] if isinstance(learner, Actor) else 0.5 * (outputs - 1.0) ** 2
        return (error * mask).sum() / total, {}

    mine = balance([len(s) for s in sequences], learner.runtime.dp_size)[learner.runtime.dp_rank]
    microbatches = pack_all([sequences[i] for i in mine], budget(learner), *rounding(parallel))
    result = learner.train_step(microbatches, loss)
    assert result.applied
    return {**result.metrics, "grad_norm": result.grad_norm}


def distributed(**sizes: Any) -> ParallelConfig:
    return ParallelConfig(distributed_optimizer=True, **sizes)


TP2: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "ep2-over-replicas": (2, distributed(ep=2)),
    "tp2": (2, ParallelConfig(**TP2)),
    "tp2ep2-recompute": (2, ParallelConfig(**TP2, ep=2, recompute="full")),
    "pp2ep2": (4, distributed(pp=2, ep=2, overlap=True)),
    "cp2ep2": (2, ParallelConfig(cp=2, ep=2)),
    "tp2ep4": (4, ParallelConfig(**TP2, ep=4, overlap=True, recompute="selective")),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, list[float]]]]:
    """With a dense layer among the sparse ones, or not: the model, and its training on one rank."""
    dense = {False: [], True: [1]}
    folders = {
        mixed: save_tiny_model(tmp_path_factory.mktemp("hf"), "qwen3_moe", mlp_only_layers=layers)
        for mixed, layers in dense.items()
    }
    return {
        mixed: (folder, run_distributed_test(train, 1, folder, ParallelConfig())[0])
        for mixed, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("mixed", "name"),
    [
        (False, "ep2-over-replicas"),
        (False, "tp2ep2-recompute"),
        (False, "cp2ep2"),
        (True, "pp2ep2"),
        pytest.param(False, "pp2ep2", marks=pytest.mark.slow),
        pytest.param(False, "tp2", marks=pytest.mark.slow),
        pytest.param(False, "tp2ep4", marks=pytest.mark.slow),
        pytest.param(True, "ep2-over-replicas", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_under_every_layout(
    reference: dict[bool, tuple[Path, dict[str, list[float]]]], mixed: bool, name: str
) -> None:
    folder, expected = reference[mixed]
    world_size, parallel = LAYOUTS[name]
    for ours in run_distributed_test(train, world_size, folder, parallel, timeout_s=120):
        assert ours.keys() == expected.keys()
        for key, values in expected.items():
            worst = max(abs(a - b) for a, b in zip(ours[key], values, strict=True))
            limit = 1e-5 if key != "logprobs" else 1e-4  # AdamW's division magnifies float32 noise in weights
            assert worst <= limit, f"{key} differs by {worst:.1e}"


def reference_logprobs(model: Any, ids: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of transformers: log-probs of every token but the first [T - 1], and each layer's router logits [T, experts]."""
    tokens = torch.tensor([ids])
    output = model(tokens, output_router_logits=True)
    return output.logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0], output.router_logits


@pytest.mark.parametrize(
    "sizes", [{"norm_topk_prob": False, "num_experts_per_tok": 3}, {"decoder_sparse_step": 2}], ids=str
)
def test_logprobs_equal_transformers(tmp_path: Path, sizes: dict[str, Any]) -> None:
    folder, sequences = save_tiny_model(tmp_path / "hf", "qwen3_moe", **sizes), make_sequences(7)

    def body() -> list[Tensor]:
        actor, _ = start(folder, ParallelConfig())
        microbatches = pack_all(sequences, 160)
        return unpack_all(microbatches, actor.logprobs(microbatches))

    ours = run_distributed_test(body, 1)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for row, sequence in zip(ours, sequences, strict=True):
            assert (row[1:] - reference_logprobs(model, list(sequence.token_ids))[0]).abs().max() <= 1e-4


def test_losses_and_gradients_equal_transformers(tmp_path: Path) -> None:
    """One AdamW step on the token loss and the routers' losses, which are derived here from transformers' logits."""
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe")
    sequences, fixed = make_sequences(0), make_sequences(99)

    def body() -> tuple[dict[str, float], list[Tensor]]:
        actor, _ = start(folder, ParallelConfig(), **LOSSES)
        result = result_of(actor, ParallelConfig(), 0)
        microbatches = pack_all(fixed, 160)
        return result, unpack_all(microbatches, actor.logprobs(microbatches))

    ours, new_logprobs = run_distributed_test(body, 1)[0]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_tokens = sum(map(len, sequences))
    token_loss, aux_loss, z_loss, picks = (torch.zeros(()) for _ in range(4))
    for sequence in sequences:
        logprobs, router_logits = reference_logprobs(model, list(sequence.token_ids))
        token_loss = token_loss - logprobs[2:].sum() / sum(len(s) - 3 for s in sequences)
        picks = picks + torch.stack([torch.zeros(8).index_add(0, r.topk(2).indices.flatten(), torch.ones(2 * len(r)))
                                     for r in router_logits])  # fmt: skip
        for logits in router_logits:
            probabilities = logits.softmax(-1)
            share = torch.nn.functional.one_hot(probabilities.topk(2).indices, 8).sum(1).float().mean(0)
            weight = len(sequence) / num_tokens / len(router_logits)
            aux_loss = aux_loss + weight * 8 * (share * probabilities.mean(0)).sum()
            z_loss = z_loss + weight * logits.logsumexp(-1).square().mean()
    (token_loss + LOSSES["router_aux_loss_coef"] * aux_loss + LOSSES["router_z_loss_coef"] * z_loss).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)).step()

    load = picks / picks.mean(1, keepdim=True)
    share = picks / picks.sum(1, keepdim=True)
    expected = {
        "loss": token_loss,
        "router_aux_loss": aux_loss,
        "router_z_loss": z_loss,
        "router_max_load": load.max(),
        "router_min_load": load.min(),
        "router_balance": -(torch.special.xlogy(share, share).sum(1) / math.log(8)).mean(),
    }
    numbers = {key: value.item() for key, value in expected.items()}
    assert {key: ours[key] for key in expected} == pytest.approx(numbers, abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(norm, abs=1e-4)
    with torch.no_grad():
        for row, sequence in zip(new_logprobs, fixed, strict=True):
            assert (row[1:] - reference_logprobs(model, list(sequence.token_ids))[0]).abs().max() <= 1e-4


def test_one_sequence_and_layer_have_the_loss_of_transformers(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0])
    sequence = make_sequences(5, count=1)

    def body() -> float:
        actor, _ = start(folder, ParallelConfig())
        result = actor.train_step(pack_all(sequence, 160), lambda outputs, microbatch: (-outputs[0].mean(), {}))
        return result.metrics["router_aux_loss"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model(torch.tensor([sequence[0].token_ids]), output_router_logits=True).aux_loss
    assert run_distributed_test(body, 1)[0] == pytest.approx(theirs.item(), abs=1e-5)


def test_bfloat16_trains(tmp_path: Path) -> None:
    folder, layout = save_tiny_model(tmp_path / "hf", "qwen3_moe"), distributed(**TP2, ep=2)

    def body(parallel: ParallelConfig, dtype: str) -> list[float]:
        actor, _ = start(folder, parallel, dtype=dtype)
        return [result_of(actor, parallel, seed)["loss"] for seed in range(2)]

    for ours, theirs in zip(
        run_distributed_test(body, 4, layout, "bfloat16")[0],
        run_distributed_test(body, 1, ParallelConfig(), "float32")[0],
        strict=True,
    ):
        assert math.isclose(ours, theirs, rel_tol=0.01)


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        ({"tp": 2, "dp": 1}, {}, "experts with tp 2 need parallel.sequence_parallel"),
        ({"ep": 3, "dp": 3}, {}, "experts 8 are not divisible by ep 3"),
        ({"dp": 1}, {"fp8": "hybrid"}, "model.fp8 does not work with a mixture of experts"),
    ],
)
def test_what_experts_exclude_is_refused(tmp_path: Path, sizes: dict[str, Any], model: dict, message: str) -> None:
    folder, parallel = save_tiny_model(tmp_path / "hf", "qwen3_moe"), ParallelConfig(**sizes)

    def body() -> None:
        with pytest.raises(UserError, match=message):
            start(folder, parallel, **model)
        runtime.sum_over_ranks(1)  # rank 0 holds the store that the others may still be reading

    run_distributed_test(body, parallel.tp * (parallel.dp or 1))


def test_what_leaves_the_gpu_includes_the_experts(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2)

    def body() -> tuple[int, dict[str, int]]:
        actor, _ = start(folder, distributed())
        held = {part: sum(storage.nbytes() for storage in every) for part, every in actor.storages().items()}
        return sum(parameter.numel() for parameter in actor.model.parameters()), held

    count, held = run_distributed_test(body, 1)[0]
    assert held["weights"] >= 4 * count and held["gradients"] >= 4 * count and held["optimizer state"] >= 8 * count
