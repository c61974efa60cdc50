"""Offloading on real ranks: storages are empty in between, and training continues as if nothing had happened."""

import ctypes
import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_vcppo.config import Dtype, ParallelConfig
from megatron_vcppo.mcore import offload
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.learner import Reference
from megatron_vcppo.run.manifest import read_manifest
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import start, step
from tools.benchmarks._tiny_models import save_tiny_model

LAYOUTS = {
    "plain": ParallelConfig(),
    "distributed": ParallelConfig(dp=2, distributed_optimizer=True),
    "overlap": ParallelConfig(dp=2, distributed_optimizer=True, overlap=True),
    "replicas": ParallelConfig(dp=2),
    "tp2-pp2": ParallelConfig(tp=2, pp=2, sequence_parallel=True),
}


def live_bytes() -> int:
    """Bytes of all tensors that exist, each storage once: what "the device" holds, host copies included."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def train(hf: Path, folder: Path, parallel: ParallelConfig, dtype: Dtype, offloaded: bool) -> dict[str, Any]:
    """Three steps of actor and critic, with everything in host memory before the second and the third."""
    actor, critic = start(hf, parallel, dtype)
    reference = Reference(actor.model)
    host, history, sizes = offload.HostMemory(), [], []
    for i in range(3):
        if offloaded and i:
            on_device = live_bytes() - sum(buffer.nbytes for buffer in host.buffers.values())
            moved = sum(host.take(learner.storages()["optimizer state"]) for learner in (actor, critic))
            moved += sum(host.take(learner.storages()["gradients"], keep=False) for learner in (actor, critic))
            with pytest.raises(RuntimeError, match="gradients and optimizer state of the model are in host memory"):
                step(actor, parallel, i)
            weights = sum(host.take(runner.storages()["weights"]) for runner in (actor, critic, reference))
            for part, storages in (part for learner in (actor, critic) for part in learner.storages().items()):
                assert storages and not any(storage.nbytes() for storage in storages), part
            with pytest.raises(RuntimeError, match="weights of the model are in host memory"):
                next(stream_hf(actor.model), None)
            with pytest.raises(RuntimeError, match="optimizer state of the model are in host memory"):
                checkpoint_folder(folder, hf).save(i, {"critic": critic}, {})
            rest = live_bytes() - sum(buffer.nbytes for buffer in host.buffers.values())
            sizes.append((on_device - rest, moved + weights))
            assert host.give_back() == moved + weights and not host.parked
        history += [step(actor, parallel, i), step(critic, parallel, i)]
    checkpoints = checkpoint_folder(folder, hf)
    checkpoints.save(3, {"actor": actor, "critic": critic}, {})
    checkpoints.finish()
    files = read_manifest(folder / "iter_0000003")["files"]
    return {"history": history, "sizes": sizes, "files": {n: f for n, f in files.items() if n.endswith(".distcp")}}


QUICK = {("overlap", "float32"), ("distributed", "bfloat16")}
CASES = [
    pytest.param(layout, dtype, marks=() if (layout, dtype) in QUICK else pytest.mark.slow)
    for layout in LAYOUTS
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_training_continues_bit_by_bit(layout: str, dtype: Dtype, tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    hf = save_tiny_model(tmp_path / "hf", "qwen2", tied=layout == "tp2-pp2")
    ranks = parallel.tp * parallel.pp * (parallel.dp or 1)
    moved = run_distributed_test(train, ranks, hf, tmp_path / "moved", parallel, dtype, True)
    plain = run_distributed_test(train, ranks, hf, tmp_path / "plain", parallel, dtype, False)
    for rank, (one, other) in enumerate(zip(moved, plain)):
        assert one["history"] == other["history"], f"rank {rank}"
        assert one["files"] == other["files"] and one["files"]
        for freed, counted in one["sizes"]:
            # Some scalars may come and go meanwhile.
            assert counted > 100_000 and abs(freed - counted) < 1000, "what was moved is not what the device lost"


def rss_of_a_move(hf: Path) -> tuple[int, int, int]:
    """Resident bytes that a move adds to the process: with host copies, and of gradients, which need none."""
    actor, _ = start(hf, ParallelConfig())
    step(actor, ParallelConfig(), 0)
    parts, host, process = actor.storages(), offload.HostMemory(), psutil.Process()

    def resident() -> int:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed may stay in the heap otherwise
        return process.memory_info().rss

    before = resident()
    copied = host.take(parts["optimizer state"] + parts["weights"])
    between = resident()
    host.take(parts["gradients"], keep=False)
    return copied, between - before, resident() - between


def test_the_memory_is_really_free(tmp_path: Path) -> None:
    """On CPU a host copy takes what the device's buffer gave back: the sum stays; gradients are gone."""
    hf = save_tiny_model(tmp_path / "hf", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    ((copied, growth, of_gradients),) = run_distributed_test(rss_of_a_move, 1, hf)
    assert copied > 60e6 and abs(growth) < 0.15 * copied
    assert of_gradients < -0.25 * copied, "gradients are a third of what was copied"
