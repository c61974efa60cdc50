"""Weights through the memory of two nodes: each node's first tensor-parallel group writes, for its own engines."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf, stream_hf
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.rollout.node_folder import NodeFolder
from megatron_vcppo.rollout.weight_files import read_folder
from megatron_vcppo.weight_sync.rank_role import role_on_node
from megatron_vcppo.weight_sync.transport import HostTransport
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._tiny_models import save_tiny_model

Weights = dict[str, torch.Tensor]


def write(hf: Path, rendezvous: Path) -> tuple[int, Weights, Weights, bool]:
    """Four ranks, tp 2 × dp 2, as two nodes of two ranks. Returns what this rank wrote, and what its engines find."""
    parallel = ParallelConfig(tp=2, dp=2)
    world = runtime.start(parallel, seed=1, timeout_s=60)
    model = build_actor(Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32"), parallel)
    load_hf(model, hf)
    node, local_rank = divmod(world.rank, 2)
    role = role_on_node(world.pp_rank, world.rank, local_rank, world.tp_size)
    assert role.takes_part and role.num_senders == 2 and role.pp_size == 1 and role.is_driver == (world.rank == 0)
    folder = NodeFolder(rendezvous, node)
    transport = HostTransport(folder, rendezvous, 1 << 14, role, verify=True)
    found = []
    for version in (1, 2):
        transport.connect([])
        torch.distributed.barrier()
        sent = transport.send(stream_hf(model), version)
        torch.distributed.barrier()
        own = Path(transport.folder(version, node))
        files = sorted(own.glob("*.safetensors"))
        assert len(files) > 3 and sum(file.stat().st_size for file in files) > sent > 0
        assert own.stat().st_mode & 0o077 == 0 and own.parent.parent == folder.path
        found.append(dict(read_folder(own)))
        torch.distributed.barrier()  # the next push begins by deleting these
    assert not Path(transport.folder(1, node)).exists(), "the weights before are gone"
    torch.distributed.barrier()
    other = Path(transport.folder(2, 1 - node)).exists()
    torch.distributed.barrier()
    transport.drop()
    torch.distributed.barrier()
    assert os.listdir(folder.path) == ["users"]
    torch.distributed.barrier()
    folder.close()
    return sent, found[0], found[1], other


def test_every_node_gets_all_weights_from_its_own_ranks(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    expected = load_file(hf / "model.safetensors")
    results = run_distributed_test(write, 4, hf, tmp_path)
    num_bytes = sum(tensor.nbytes for tensor in expected.values())
    assert results[0][0] + results[1][0] == results[2][0] + results[3][0] == num_bytes
    for _, first, second, other in results:
        assert other, "the two nodes have folders of their own"
        for found in (first, second):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
