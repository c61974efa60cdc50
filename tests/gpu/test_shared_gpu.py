"""A GPU that trainer and engine share: what offloading frees, and what a sleeping engine gives back."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.mcore.offload import HostMemory

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_offloading_gives_the_memory_to_other_processes_and_brings_the_bits_back() -> None:
    kept, zeroed = torch.randn(64 * MIB, device="cuda"), torch.ones(64 * MIB, device="cuda")
    view, expected = kept[1000:2000].view(10, 100), kept.cpu()
    before = free_bytes()
    host = HostMemory()
    moved = host.take([kept.untyped_storage()]) + host.take([zeroed.untyped_storage()], keep=False)
    assert moved == 512 * MIB and free_bytes() - before >= 0.98 * moved
    assert all(buffer.is_pinned() for buffer in host.buffers.values())
    assert host.give_back() == moved
    assert torch.equal(kept.cpu(), expected) and torch.equal(view.cpu().reshape(-1), expected[1000:2000])
    assert not zeroed.any()
    assert host.take([kept.untyped_storage()]) == 256 * MIB, "the second move takes the same host buffer"
    assert len(host.buffers) == 1
    host.give_back()


def test_a_sleeping_engine_frees_its_memory_and_wakes_with_pushed_weights(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    from megatron_vcppo.mcore.rank_messages import RankGroup
    from megatron_vcppo.rollout.node_folder import NodeFolder
    from megatron_vcppo.weight_sync.push_plan import SINGLE
    from megatron_vcppo.weight_sync.transport import HostTransport
    from megatron_vcppo.weight_sync.turns import SleepingSync
    from tools.benchmarks._rollout_node import RolloutNode, make_prompts, save_policy, weights_of

    models = [save_policy(tmp_path / f"m{seed}", seed=seed) for seed in range(2)]
    settings = {"engine": {"gpu_memory_utilization": 0.3, "enforce_eager": True}}
    with RolloutNode(tmp_path / "node", models[0], settings, engines_on="trainer_gpus") as node:
        node.wait()
        asleep = free_bytes()
        with NodeFolder(node.rendezvous, 0) as shared:
            transport = HostTransport(shared, node.rendezvous, 1 << 20)
            sync = SleepingSync(WeightSyncConfig(), node.rendezvous, SINGLE, RankGroup(60.0), transport)
            outputs = []
            for version, model in enumerate((models[0], models[1], models[0])):
                sync.sync(version, weights_of(model))
                assert asleep - free_bytes() > 0.2 * torch.cuda.mem_get_info()[1]
                outputs.append(node.greedy(version, make_prompts(4)))
                sync.put_to_sleep(2)
                time.sleep(1)
                assert abs(free_bytes() - asleep) < 256 * MIB
    assert outputs[0] == outputs[2] != outputs[1]
