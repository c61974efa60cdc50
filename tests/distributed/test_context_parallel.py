"""Sequences shared by context-parallel ranks: attention, training of actor and critic, reward model, checkpoints."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vcppo.config import ModelConfig, OptimizerConfig, ParallelConfig, RewardModelConfig, ScheduleConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import PackedMicrobatch, balance, pack, pack_all, rounding, unpack_all
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.context_parallel import WHOLE, PackedParams, shard_of
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.layers import PackedAttention
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.model import build_actor, build_critic
from megatron_vcppo.records import TrainSequence
from megatron_vcppo.stages.reward_model import make_step, training_units
from tests.helpers import training
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences
from tools.benchmarks._tiny_models import save_tiny_model

# A large eps: the division by the root of tiny second moments would magnify float32 noise in the weights.
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, eps=1e-5)
CPU = torch.device("cpu")

Trained = Callable[[str, bool], tuple[Path, dict[str, list[float]]]]
"""By family and tied embeddings: the folder of a model, and its training on one rank."""


def attend(heads: tuple[int, int], cp_size: int) -> dict[str, torch.Tensor]:
    """Output of attention and gradients of query, key and value, of whole micro-batches: float64."""
    parallel = ParallelConfig(cp=cp_size)
    runtime.start(parallel, seed=1, timeout_s=60)
    num_heads, num_kv_heads = heads
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=num_heads)
    # The same segments for every size: multiples of 2 · 2 and 2 · 3, and a dummy.
    packed = pack([TrainSequence((1,) * n) for n in (5, 40, 23)], [0, 1, 2], 24, 12)
    generator = torch.Generator().manual_seed(0)
    tokens = packed.num_tokens
    shapes = {"query": (tokens, num_heads, 8), "key": (tokens, num_kv_heads, 8), "value": (tokens, num_kv_heads, 8)}
    whole = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    pull = torch.randn(tokens, num_heads * 8, generator=generator, dtype=torch.float64)

    shard = shard_of(packed, CPU)
    mine = {name: shard.take(tensor).clone().requires_grad_() for name, tensor in whole.items()}
    params = PackedParams(qkv_format="thd", cu_seqlens_q=packed.cu_seqlens, shard=shard)
    out = PackedAttention(config)(*mine.values(), None, packed_seq_params=params)
    (out * shard.take(pull)).sum().backward()
    results = {"out": out.detach(), **{name: tensor.grad for name, tensor in mine.items()}}
    return {name: shard.gather_outputs(tensor.contiguous())[0] for name, tensor in results.items()}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["equal-heads", "grouped-heads"])
def test_attention_over_shared_sequences_is_attention(heads: tuple[int, int]) -> None:
    alone = run_distributed_test(attend, 1, heads, 1)[0]
    for cp_size in (2, 3):
        for ours in run_distributed_test(attend, cp_size, heads, cp_size):
            for name, expected in alone.items():
                torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-12)


def train(folder: Path, parallel: ParallelConfig) -> dict[str, list[float]]:
    """Ten steps of an actor and a critic: losses, gradient norms, and outputs of a fixed batch before and after."""
    runtime.start(parallel, seed=1, timeout_s=60)
    arch, model = Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32")
    learners: dict[str, Actor | Critic] = {}
    for build, learner_class in ((build_actor, Actor), (build_critic, Critic)):
        built = build(arch, model, parallel)
        load_hf(built, folder)
        learners[built.kind] = learner_class(built, parallel, OPTIMIZER, ScheduleConfig(), 10)
    assert learners["actor"].runtime.cp_size == parallel.cp
    history: dict[str, list[float]] = {}

    def packed(sequences: list[TrainSequence]) -> list[PackedMicrobatch]:
        return pack_all(sequences, 160, *rounding(parallel))

    def record(moment: str) -> None:
        fixed = packed(make_sequences(99))
        for kind, learner in learners.items():
            outputs = learner.logprobs(fixed) if isinstance(learner, Actor) else learner.values(fixed)
            history[f"{kind} outputs {moment}"] = [
                value for row in unpack_all(fixed, outputs) for value in row.tolist()
            ]

    record("before")
    for seed in range(10):
        sequences = make_sequences(seed)
        total = sum(sum(s.fields["loss_mask"]) for s in sequences)
        mine = balance([len(s) for s in sequences], parallel.dp or 1)[runtime.current().dp_rank]
        for kind, learner in learners.items():

            def loss(outputs: Any, microbatch: PackedMicrobatch, kind: str = kind, total: float = total) -> Any:
                mask = microbatch.fields["loss_mask"].float()
                error = -outputs[0] + 0.01 * outputs[1] if kind == "actor" else 0.5 * (outputs - 1.0) ** 2
                return (error * mask).sum() / total, {"tokens": (mask.sum(), torch.tensor(0.0))}

            result = learner.train_step(packed([sequences[i] for i in mine]), loss)
            assert result.applied and result.metrics["tokens"] == total
            history.setdefault(f"{kind} loss", []).append(result.metrics["loss"])
            history.setdefault(f"{kind} grad_norm", []).append(result.grad_norm)
    record("after")
    return history


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each is trained once."""

    @functools.cache
    def make(family: str, tied: bool) -> tuple[Path, dict[str, list[float]]]:
        folder = save_tiny_model(tmp_path_factory.mktemp(family) / "hf", family, tied)
        alone = run_distributed_test(train, 1, folder, ParallelConfig())[0]
        moved = zip(alone["actor outputs before"], alone["actor outputs after"], strict=True)
        assert len(alone["critic loss"]) == 10 and max(abs(a - b) for a, b in moved) > 0.5
        return folder, alone

    return make


def assert_same_training(model: tuple[Path, dict[str, list[float]]], layout: tuple[int, dict[str, Any]]) -> None:
    (folder, alone), (world_size, sizes) = model, layout
    for ours in run_distributed_test(train, world_size, folder, ParallelConfig(**sizes), timeout_s=120):
        for key, values in alone.items():
            worst = max(abs(a - b) for a, b in zip(ours[key], values, strict=True))
            assert worst <= 1e-5, f"{key} differs by {worst:.1e}"


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2pp2-recompute": (4, {"cp": 2, "pp": 2, "recompute": "selective"}),
    "cp2dp2-distributed-optimizer": (4, {"cp": 2, "dp": 2, "distributed_optimizer": True, "overlap": True}),
}
MORE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, {"cp": 2}),
    "cp2tp2-sequence-parallel": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "cp3": (3, {"cp": 3}),
    "cp4": (4, {"cp": 4, "distributed_optimizer": True, "recompute": "full"}),
    "cp2tp2pp2": (8, {"cp": 2, "tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full", "overlap": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_with_shared_sequences(models: Trained, layout: str) -> None:
    assert_same_training(models("qwen3", False), LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS | MORE_LAYOUTS)
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_training_is_the_same_for_more_families_and_layouts(
    models: Trained, family: str, tied: bool, layout: str
) -> None:
    assert_same_training(models(family, tied), (LAYOUTS | MORE_LAYOUTS)[layout])


@pytest.mark.slow
def test_bfloat16_trains(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "hf")

    def losses(parallel: ParallelConfig) -> list[float]:
        actor, _ = training.start(folder, parallel, "bfloat16")
        return [training.step(actor, parallel, seed)[0] for seed in range(4)]

    ours = run_distributed_test(losses, 2, ParallelConfig(cp=2, distributed_optimizer=True))[0]
    alone = run_distributed_test(losses, 1, ParallelConfig())[0]
    assert ours == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize("settings", [RewardModelConfig(loss="pairwise"), RewardModelConfig(loss="bce")])
def test_a_reward_models_step_is_the_same(tmp_path: Path, settings: RewardModelConfig) -> None:
    """The tokens of a pair's two scores lie on different ranks."""
    folder = save_tiny_model(tmp_path / "hf")
    examples = []
    for number, sequence in enumerate(make_sequences(3)):
        good = number % 3 > 0
        no, zeros = (False,) * (len(sequence) - 1), (0.0,) * (len(sequence) - 1)
        fields = {"last_mask": (*no, True), "label": (*zeros, float(good))}
        examples.append((TrainSequence(sequence.token_ids, fields), good))

    def body(parallel: ParallelConfig) -> tuple[dict[str, float], float]:
        _, critic = training.start(folder, parallel)
        multiple, segment_multiple = rounding(parallel)
        packer = Packer(160, multiple, critic.runtime.dp_rank, critic.runtime.dp_size, segment_multiple)
        result = critic.train_step(*make_step(training_units(examples, settings), packer, settings))
        return result.metrics, result.grad_norm

    (metrics, norm), *_ = run_distributed_test(body, 1, ParallelConfig())
    for world_size in (2, 4):
        for our_metrics, our_norm in run_distributed_test(body, world_size, ParallelConfig(cp=2)):
            assert our_metrics == pytest.approx(metrics, abs=1e-5) and our_norm == pytest.approx(norm, abs=1e-5)


@pytest.mark.parametrize(
    "distributed_optimizer", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "distributed-optimizer"]
)
def test_a_checkpoint_continues_without_context_parallelism(tmp_path: Path, distributed_optimizer: bool) -> None:
    hf, folder = save_tiny_model(tmp_path / "hf"), tmp_path / "ck"
    shared, alone = (ParallelConfig(cp=cp, distributed_optimizer=distributed_optimizer) for cp in (2, 1))
    through = run_distributed_test(training.train, 2, hf, folder, shared, range(6), save_at=3)[0]
    for world_size, parallel in ((1, alone), (2, shared)):
        ours = run_distributed_test(training.train, world_size, hf, folder, parallel, range(3, 6))[0]
        for (loss, norm), (expected_loss, expected_norm) in zip(ours, through[6:], strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5) and norm == pytest.approx(expected_norm, abs=1e-4)
    assert ours == through[6:], "the same layout must continue bit-equal"


def test_gradients_of_outputs_that_no_loss_reads_are_skipped() -> None:
    gradients: list[torch.Tensor | None] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor | None) -> torch.Tensor | None:
            gradients.append(grad)
            return grad

    def body() -> tuple[list[float], bool]:
        runtime.start(ParallelConfig(cp=2), seed=1, timeout_s=60)
        shard = shard_of(pack([TrainSequence((1,) * 8)], [0], 4, 4), CPU)
        read, unread = ((torch.arange(4.0) + 10 * shard.rank).requires_grad_() for _ in range(2))
        whole, _ = shard.gather_outputs(read, Watch.apply(unread))
        (whole * torch.arange(8.0)).sum().backward()
        assert read.grad is not None
        return [*whole.tolist(), *read.grad.tolist()], gradients in ([], [None])

    whole = [0.0, 1.0, 10.0, 11.0, 12.0, 13.0, 2.0, 3.0]
    assert run_distributed_test(body, 2) == [([*whole, 0.0, 1.0, 6.0, 7.0], True), ([*whole, 2.0, 3.0, 4.0, 5.0], True)]


def test_one_rank_holds_everything() -> None:
    tensor = torch.arange(4.0)
    assert WHOLE.take(tensor) is tensor
    assert WHOLE.gather_outputs(tensor)[0] is tensor and WHOLE.gather_keys(tensor)[0] is tensor
