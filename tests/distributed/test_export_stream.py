"""The stream of Hugging Face tensors from a live Megatron model is the checkpoint it was loaded from, bit by bit."""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf, stream_hf
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.rollout.broadcast import receive, send
from megatron_vcppo.rollout.group import join_group, reach_store, serve_store
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._measure import peak_bytes
from tools.benchmarks._tiny_models import save_tiny_model

BUCKET_BYTES = 4 << 20


def stream(folder: Path, tp: int, pp: int, **experts: Any) -> list[tuple[str, torch.Tensor]]:
    parallel = ParallelConfig(tp=tp, pp=pp, **experts)
    runtime.start(parallel, seed=1, timeout_s=60)
    model = build_actor(Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32"), parallel)
    load_hf(model, folder)
    return [(name, tensor.clone()) for name, tensor in stream_hf(model)]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("olmo2", False)])
def test_the_stream_is_the_checkpoint(tmp_path, family: str, tied: bool, tp: int, pp: int) -> None:
    folder = save_tiny_model(tmp_path, family, tied)
    per_rank = run_distributed_test(stream, tp * pp, folder, tp, pp)
    expected = load_file(folder / "model.safetensors")
    stages = [per_rank[first : first + tp] for first in range(0, tp * pp, tp)]
    assert sorted(name for stage in stages for name, _ in stage[0]) == sorted(expected)
    for stage in stages:  # all ranks of a tensor-parallel group get the same row of tensors
        assert all([name for name, _ in rank] == [name for name, _ in stage[0]] for rank in stage)
    for rank in per_rank:
        for name, tensor in rank:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "pp": 1, "ep": 4, "sequence_parallel": True}, {"tp": 1, "pp": 2, "ep": 2}], ids=str
)
def test_the_stream_of_a_mixture_is_the_checkpoint_on_all_ranks_that_share_experts(tmp_path, layout: dict) -> None:
    folder = save_tiny_model(tmp_path, "qwen3_moe", mlp_only_layers=[2])
    expected, per_rank = load_file(folder / "model.safetensors"), run_distributed_test(stream, 4, folder, **layout)
    size = 4 // layout["pp"]
    stages = [per_rank[first : first + size] for first in range(0, 4, size)]
    assert sorted(name for stage in stages for name, _ in stage[0]) == sorted(expected)
    for stage in stages:
        for rank in stage:
            assert [name for name, _ in rank] == [name for name, _ in stage[0]]
            assert all(torch.equal(tensor, expected[name]) for name, tensor in rank)


def memory_of_a_push(folder: Path, meeting: Path) -> int:
    """Two tensor-parallel trainer ranks push to the third rank; how much rank 0's memory rises meanwhile."""
    rank, address = int(os.environ["RANK"]), "127.0.0.1"
    if rank == 2:
        store = reach_store(address, int(wait_for_text(meeting)), 60.0)
        for _ in receive([[join_group(store, 1, 2, "gloo", torch.device("cpu"), 60.0, address, "secret")]]):
            pass
        return 0
    os.environ["WORLD_SIZE"] = "2"
    parallel = ParallelConfig(tp=2)
    runtime.start(parallel, seed=1, timeout_s=60)
    model = build_actor(Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32"), parallel)
    load_hf(model, folder)
    if rank == 1:
        for _ in stream_hf(model):
            pass
        return 0
    store = serve_store(address, 60.0)
    meeting.with_suffix(".tmp").write_text(str(store.port))
    meeting.with_suffix(".tmp").rename(meeting)
    group = join_group(store, 0, 2, "gloo", torch.device("cpu"), 60.0, address, "secret")
    # What is freed goes back to the system at once, so that the resident set shows what is held, not what lies between.
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)
    return peak_bytes(lambda: send(group, stream_hf(model), BUCKET_BYTES))


def wait_for_text(path: Path) -> str:
    for _ in range(600):
        if path.exists():
            return path.read_text()
        time.sleep(0.1)
    raise TimeoutError(path)


def test_a_push_holds_two_buckets_and_one_gather(tmp_path) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    folder = save_tiny_model(tmp_path / "model", "qwen2", tied=False, **sizes)
    tensors = load_file(folder / "model.safetensors").values()
    largest, model_bytes = max(tensor.nbytes for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    bound = 2 * BUCKET_BYTES + 2 * largest + (8 << 20)  # a gather holds the shards and the whole; some slack
    rise = run_distributed_test(memory_of_a_push, 3, folder, tmp_path / "port")[0]
    assert rise < bound < model_bytes / 2, f"{rise / 1e6:.0f} MB of {model_bytes / 1e6:.0f} MB"
