"""The byte stream of a push on real gloo ranks: what comes out is what went in, and a stalled peer ends it."""

import os
import socket

import pytest
import torch

from megatron_vcppo.rollout.broadcast import receive, send, unpack
from megatron_vcppo.rollout.group import join_group, reach_store, serve_store
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.weight_sync.push_plan import Target, first_ranks, streams_of, world_size
from tests.helpers.distributed import run_distributed_test

CPU = torch.device("cpu")


def make_tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        ("large", torch.randn(700, 1000, generator=generator)),
        ("large_transposed", torch.randn(512, 1024, generator=generator).T),
        ("bf16", torch.randn(33, 3, generator=generator).bfloat16()),
        ("scalar", torch.tensor(2.5)),
        ("transposed", torch.randn(40, 50, generator=generator).T),
        ("int8", torch.arange(-5, 6, dtype=torch.int8)),
        ("half", torch.randn(1000, generator=generator).half()),
        ("double", torch.randn(7, generator=generator).double()),
    ]
    return [*tensors, *((f"row_{i}", torch.full((i + 1,), float(i))) for i in range(40))]


def exchange_tensors(port: int, bucket_bytes: int, rounds: int) -> list[list[tuple[str, torch.Tensor]]]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False)
    group = join_group(store, rank, size, "gloo", CPU, 20.0, "127.0.0.1")
    taken = []
    for _ in range(rounds):
        if rank == 0:
            assert send(group, iter(make_tensors()), bucket_bytes) >= sum(t.nbytes for _, t in make_tensors())
        else:
            taken.append([(name, tensor.clone()) for name, tensor in unpack(receive(group))])
    return taken


@pytest.mark.parametrize("bucket_bytes", [1 << 10, 10_000, 1 << 20])
def test_every_receiver_gets_every_tensor_bit_by_bit(bucket_bytes: int) -> None:
    results = run_distributed_test(exchange_tensors, 3, free_port("127.0.0.1"), bucket_bytes, 2)
    for rounds in results[1:]:
        for taken in rounds:
            assert [name for name, _ in taken] == [name for name, _ in make_tensors()]
            for (_, got), (name, sent) in zip(taken, make_tensors()):
                assert got.dtype == sent.dtype and torch.equal(got, sent), name


def stall(port: int) -> str:
    """Receiver 1 takes one bucket and then nothing until the sender has given up; how the others end."""
    rank = int(os.environ["RANK"])
    store = torch.distributed.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False)
    group = join_group(store, rank, 2, "gloo", CPU, 2.0, "127.0.0.1")
    try:
        if rank == 0:
            send(group, iter([(f"t{i}", torch.zeros(1 << 22)) for i in range(8)]), 1 << 20)
        else:
            next(receive(group))
            store.wait(["given up"])
    except RuntimeError as error:
        return str(error)
    finally:
        if rank == 0:
            store.set("given up", "")
    return ""


def test_a_stalled_receiver_ends_the_push_within_its_deadline() -> None:
    error, _ = run_distributed_test(stall, 2, free_port("127.0.0.1"))
    assert error


def test_a_store_that_nobody_serves_is_reported() -> None:
    with pytest.raises(Exception, match=r"(?i)timed? ?out|refused|connect"):
        reach_store("127.0.0.1", free_port("127.0.0.1"), 1.0)


def test_ranks_are_counted_over_all_workers_of_all_engines() -> None:
    targets = [Target(Engine(0, i, 0, "127.0.0.1", 5000 + i, 1), workers) for i, workers in enumerate((1, 4, 2))]
    assert first_ranks(targets) == [1, 2, 6] and world_size(targets) == 8
    streams = streams_of(targets, [("10.0.0.1", 70), ("10.0.0.2", 71)])
    assert [(s.address, s.port, s.first_rank, s.world_size) for s in streams[1]] == [
        ("10.0.0.1", 70, 2, 8),
        ("10.0.0.2", 71, 2, 8),
    ]
    store = serve_store("127.0.0.1", 5.0)
    assert store.port > 0


def test_the_meeting_point_of_a_push_listens_on_its_address_alone() -> None:
    store = serve_store("127.0.0.2", 10)
    reach_store("127.0.0.2", store.port, 10).set("word", "here")
    assert store.get("word") == b"here"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port), 5)
