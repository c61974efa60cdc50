"""The memory plan of a mixture is what ranks hold: tensors are counted, so no other process changes the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcppo.config import Config, ParallelConfig
from megatron_vcppo.data.packing import pack_all, rounding
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.memory_plan import GIB, plan
from megatron_vcppo.records import TrainSequence
from tests.distributed.test_experts import TP2, distributed, start
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._tiny_models import save_tiny_model

LENGTH = 512
SIZES: dict[str, Any] = {"hidden_size": 128, "vocab_size": 1024, "moe_intermediate_size": 192, "head_dim": 32}


def held_on_a_rank(folder: Path, parallel: ParallelConfig) -> dict[str, float]:
    """Bytes by part after a step: the parts of the model, and what the layers of one micro-batch keep for their
    backward pass."""
    actor, _ = start(folder, parallel)
    vocabulary = SIZES["vocab_size"]
    ids = torch.randint(vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(actor.runtime.dp_rank))
    (microbatch,) = pack_all([TrainSequence(tuple(ids.tolist()))], LENGTH, *rounding(parallel))

    def loss(outputs: Any, microbatch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return -outputs[0].sum() / 1000, {}

    assert actor.train_step([microbatch], loss).applied
    held = {part: float(sum(one.nbytes() for one in every)) for part, every in actor.storages().items()}
    parameters = {p.untyped_storage().data_ptr() for p in actor.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    actor.ddp.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        actor.model.run(microbatch)
    return held | {"activations": float(sum(kept.values()))}


@pytest.mark.parametrize(
    "parallel",
    [distributed(dp=2, ep=2), ParallelConfig(**TP2, ep=2), ParallelConfig(dp=2)],
    ids=["ep 2, distributed optimizer", "tp 2, ep 2", "ep 1"],
)
def test_the_memory_plan_counts_what_ranks_hold(tmp_path: Path, parallel: ParallelConfig) -> None:
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe", max_position_embeddings=LENGTH, **SIZES)
    ranks = run_distributed_test(held_on_a_rank, 2, folder, parallel)
    config = Config()
    config.model.hf, config.model.dtype, config.model.max_length = str(folder), "float32", LENGTH
    config.parallel, config.parallel.tokens_per_microbatch = parallel, LENGTH
    planned = plan(Architecture.from_hf(folder), config, "sft")
    fullest = {part: max(rank[part] for rank in ranks) / GIB for part in ranks[0]}
    for part, measured in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer state")):
        assert planned[part] == pytest.approx(fullest[measured], rel=0.01), part
    # The plan takes the load of experts as even; here the fullest rank has a few percent more.
    assert planned["activations"] == pytest.approx(fullest["activations"], rel=0.1)
