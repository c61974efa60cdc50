"""Tokens take the experts that the engine chose, and the router's own probabilities for them: as in transformers with
these experts, under every layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.data.packing import balance, pack_all, rounding, unpack_all
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.records import TrainSequence
from tests.distributed.test_experts import LAYOUTS, budget, reference_logprobs, start
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences
from tools.benchmarks._tiny_models import save_tiny_model

NUM_LAYERS, COUNT, PER_TOKEN = 4, 8, 2


def sequences_with_experts(seed: int) -> list[TrainSequence]:
    """Random experts, which are hardly ever a router's own choice."""
    generator = np.random.default_rng(seed)

    def random_experts(length: int) -> np.ndarray:
        order = generator.random((length, NUM_LAYERS, COUNT)).argsort(-1)
        return order[..., :PER_TOKEN].astype(np.uint8)

    return [replace(s, routed_experts=random_experts(len(s) - 1)) for s in make_sequences(seed)]


def step(learner: Actor | Critic, parallel: ParallelConfig, sequences: Sequence[TrainSequence]) -> dict[str, float]:
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


def logprobs_of(actor: Actor, parallel: ParallelConfig, sequences: Sequence[TrainSequence]) -> list[Tensor]:
    microbatches = pack_all(sequences, budget(actor), *rounding(parallel))
    return unpack_all(microbatches, actor.logprobs(microbatches))


def train(folder: Path, parallel: ParallelConfig) -> dict[str, list[float]]:
    """Metrics of two replayed steps, and log-probs before and after them."""
    actor, _ = start(folder, parallel)
    fixed = sequences_with_experts(99)
    history: dict[str, list[float]] = {"before": torch.cat(logprobs_of(actor, parallel, fixed)).tolist()}
    for seed in range(2):
        for key, value in step(actor, parallel, sequences_with_experts(seed)).items():
            history.setdefault(key, []).append(value)
    return history | {"after": torch.cat(logprobs_of(actor, parallel, fixed)).tolist()}


@contextmanager
def choosing(model: Any, sequence: TrainSequence, own: list[Tensor]) -> Iterator[None]:
    """Within the block the model's routers choose the sequence's experts; ``own`` gets what they would have chosen."""
    layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    numbers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]

    def hook(number: int):
        def replay(module: Any, given: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, index = output
            own.append(index[:-1])
            index = index.clone()
            index[:-1] = torch.from_numpy(sequence.routed_experts[:, number].astype(np.int64))
            weights = logits.float().softmax(-1).gather(1, index)
            return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), index

        return replay

    hooks = [layer.mlp.gate.register_forward_hook(hook(n)) for n, layer in zip(numbers, layers, strict=True)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def test_logprobs_and_gradients_equal_transformers_with_the_same_experts(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe")
    sequences, fixed = sequences_with_experts(0), sequences_with_experts(99)

    def body() -> tuple[list[Tensor], dict[str, float], list[Tensor]]:
        actor, _ = start(folder, ParallelConfig())
        before = logprobs_of(actor, ParallelConfig(), fixed)
        result = step(actor, ParallelConfig(), sequences)
        return before, result, logprobs_of(actor, ParallelConfig(), fixed)

    before, ours, after = run_distributed_test(body, 1)[0]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def theirs(sequence: TrainSequence, own: list[Tensor]) -> Tensor:
        with choosing(model, sequence, own):
            return reference_logprobs(model, list(sequence.token_ids))[0]

    def assert_equal(rows: list[Tensor]) -> None:
        with torch.no_grad():
            for row, sequence in zip(rows, fixed, strict=True):
                assert (row[1:] - theirs(sequence, [])).abs().max() <= 1e-4

    assert_equal(before)
    with torch.no_grad():
        unlike = [
            float((row[1:] - reference_logprobs(model, list(s.token_ids))[0]).abs().max())
            for row, s in zip(before, fixed, strict=True)
        ]
    assert min(unlike) > 1e-2, "the experts make no difference"

    loss, num_different, num_replayed = torch.zeros(()), 0, 0
    for sequence in sequences:
        own: list[Tensor] = []
        loss = loss - theirs(sequence, own)[2:].sum() / sum(len(s) - 3 for s in sequences)
        given = torch.from_numpy(sequence.routed_experts.astype(np.int64)).sort(-1).values
        for number, index in enumerate(own):
            num_different += int((index.sort(-1).values != given[:, number]).any(-1).sum())
            num_replayed += len(index)
    loss.backward()
    gates = [layer.mlp.gate.weight.grad for layer in model.model.layers]
    assert all(float(grad.abs().max()) > 1e-6 for grad in gates), "nothing reaches the routers"
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)).step()
    assert ours["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(norm, abs=1e-4)
    assert ours["router_mismatch"] == pytest.approx(num_different / num_replayed)
    assert_equal(after)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, list[float]]]]:
    """With a dense layer among the sparse ones, or not: the model, and its training on one rank."""
    result = {}
    for mixed, layers in {False: [], True: [1]}.items():
        folder = save_tiny_model(tmp_path_factory.mktemp("hf"), "qwen3_moe", mlp_only_layers=layers)
        result[mixed] = (folder, run_distributed_test(train, 1, folder, ParallelConfig())[0])
    return result


@pytest.mark.parametrize(
    ("mixed", "name"),
    [
        (False, "tp2ep2-recompute"),
        (True, "pp2ep2"),
        pytest.param(False, "cp2ep2", marks=pytest.mark.slow),
        pytest.param(False, "ep2-over-replicas", marks=pytest.mark.slow),
        pytest.param(False, "tp2ep4", marks=pytest.mark.slow),
    ],
)
def test_replay_is_the_same_under_every_layout(
    reference: dict[bool, tuple[Path, dict[str, list[float]]]], mixed: bool, name: str
) -> None:
    folder, expected = reference[mixed]
    world_size, parallel = LAYOUTS[name]
    for ours in run_distributed_test(train, world_size, folder, parallel, timeout_s=120):
        assert ours.keys() == expected.keys()
        for key, values in expected.items():
            worst = max(abs(a - b) for a, b in zip(ours[key], values, strict=True))
            limit = 1e-5 if key != "after" else 1e-4  # AdamW's division magnifies float32 noise in weights
            assert worst <= limit, f"{key} differs by {worst:.1e}"


def test_neither_packing_nor_the_critic_changes_it(tmp_path: Path) -> None:
    """The order of sequences and the micro-batches' size make no difference; a critic chooses its experts itself."""
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=NUM_LAYERS)

    def body() -> tuple[list[float], float, float]:
        actor, critic = start(folder, ParallelConfig())
        sequences = sequences_with_experts(5)
        rows = logprobs_of(actor, ParallelConfig(), sequences)
        other = pack_all(sequences[::-1], 64)
        again = unpack_all(other, actor.logprobs(other))[::-1]
        plain = pack_all(make_sequences(5), 160)
        replayed = pack_all(sequences, 160)
        assert not torch.equal(torch.cat(actor.logprobs(plain)), torch.cat(actor.logprobs(replayed)))
        values = [torch.cat(critic.values(m)) for m in (plain, replayed)]
        difference = max(float((a - b).abs().max()) for a, b in zip(rows, again, strict=True))
        return [difference], float((values[0] - values[1]).abs().max()), float(values[0].abs().max())

    ours = run_distributed_test(body, 1)[0]
    assert max(ours[0]) <= 1e-5 and ours[1] == 0.0 and ours[2] > 0.0
