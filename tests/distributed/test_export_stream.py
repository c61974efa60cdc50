"""The stream of Hugging Face tensors from a live Megatron model is the checkpoint it was loaded from, bit by bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config.schema import ModelConfig, ParallelConfig
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.architecture import Architecture
from megatron_vcppo.mcore.export_stream import stream_hf
from megatron_vcppo.mcore.hf_load import load_hf
from megatron_vcppo.mcore.model import build_actor
from tests.helpers.distributed import run_distributed_test
from tests.helpers.tiny_models import save_tiny_model


def stream(folder: Path, tp: int, pp: int) -> list[tuple[str, torch.Tensor]]:
    parallel = ParallelConfig(tp=tp, pp=pp)
    runtime.start(parallel, seed=1, timeout_s=60)
    model = build_actor(Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32"), parallel)
    load_hf(model, folder)
    return [(name, tensor.clone()) for name, tensor in stream_hf(model)]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_the_stream_is_the_checkpoint(tmp_path, family: str, tied: bool, tp: int, pp: int) -> None:
    folder = save_tiny_model(tmp_path, family, tied)
    per_rank = run_distributed_test(stream, tp * pp, folder, tp, pp)
    expected = load_file(folder / "model.safetensors")
    names = [name for rank in per_rank for name, _ in rank]
    assert sorted(names) == sorted(expected)
    for rank in per_rank:
        for name, tensor in rank:
            assert torch.equal(tensor, expected[name]), name
    # each stage sends from its first tensor-parallel rank, and every stage has layers of its own
    assert [bool(rank) for rank in per_rank] == [index % tp == 0 for index in range(tp * pp)]
