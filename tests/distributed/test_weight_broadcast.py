"""The byte stream of a push on real gloo ranks: what comes out is what went in, and a stalled peer ends it."""

import os
import socket
from contextlib import suppress
from typing import Any

import pytest
import torch

from megatron_vcppo.rollout.broadcast import receive, send, unpack
from megatron_vcppo.rollout.checksum import checksum
from megatron_vcppo.rollout.group import Transfer, join_group, reach_store, serve_store
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.rollout.stripes import Stripe, pieces
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.weight_sync.push_plan import (
    MeetingPoint,
    Target,
    first_ranks,
    role_in_stage,
    streams_of,
    world_size,
)
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
    group = join_group(store, rank, size, "gloo", CPU, 20.0, "127.0.0.1", "secret")
    taken = []
    for _ in range(rounds):
        if rank == 0:
            assert send(group, iter(make_tensors()), bucket_bytes) >= sum(t.nbytes for _, t in make_tensors())
        else:
            taken.append([(name, tensor.clone()) for name, tensor in unpack(receive([[group]]))])
    return taken


@pytest.mark.parametrize("bucket_bytes", [1 << 10, 10_000, 1 << 20])
def test_every_receiver_gets_every_tensor_bit_by_bit(bucket_bytes: int) -> None:
    results = run_distributed_test(exchange_tensors, 3, free_port("127.0.0.1"), bucket_bytes, 2)
    for rounds in results[1:]:
        for taken in rounds:
            assert [name for name, _ in taken] == [name for name, _ in make_tensors()]
            for (_, got), (name, sent) in zip(taken, make_tensors()):
                assert got.dtype == sent.dtype and torch.equal(got, sent), name


def exchange_stripes(ports: list[int], bucket_bytes: int, fault: bool) -> Any:
    """Ranks 0 and 1 hold the first stage, rank 2 the second; ranks 3 to 5 receive, in chains of different order."""
    rank = int(os.environ["RANK"])
    stages = [make_tensors()[:3], make_tensors()[3:]]
    stripes = [Stripe(0, 2), Stripe(1, 2), Stripe(0, 1)]
    if rank < 3:
        store = torch.distributed.TCPStore("127.0.0.1", ports[rank], None, True, wait_for_workers=False)
        group = join_group(store, 0, 4, "gloo", CPU, 20.0, "127.0.0.1", "secret")
        if fault and rank == 1:
            send_as_is = group.broadcast

            def damage(tensor: torch.Tensor) -> Transfer:
                tensor[-1] ^= 1
                return send_as_is(tensor)

            group.broadcast = damage  # type: ignore[method-assign]
        with suppress(*([RuntimeError] if fault else [])):  # the receivers leave
            return send(group, iter(stages[rank == 2]), bucket_bytes, stripes[rank], verify=True)
        return 0
    groups = []
    for sender in range(3):
        store = torch.distributed.TCPStore("127.0.0.1", ports[sender], None, False, wait_for_workers=False)
        groups.append(join_group(store, 1 + (rank + sender) % 3, 4, "gloo", CPU, 20.0, "127.0.0.1", "secret"))
    taken = []
    try:
        for name, tensor in unpack(receive([groups[:2], groups[2:]])):
            taken.append((name, tensor.clone()))
    except RuntimeError as error:
        return str(error)
    return taken


@pytest.mark.parametrize("bucket_bytes", [1 << 10, 1 << 22])
def test_senders_of_one_stage_send_stripes_and_stages_side_by_side(bucket_bytes: int) -> None:
    ports = [free_port("127.0.0.1") for _ in range(3)]
    *sent, first, second, third = run_distributed_test(exchange_stripes, 6, ports, bucket_bytes, False)
    expected = dict(make_tensors())
    payload = sum(tensor.nbytes for tensor in expected.values())
    assert payload <= sum(sent) <= payload + 64 * len(expected), "every byte travels once, with what aligns it"
    assert abs(sent[0] - sent[1]) < 0.01 * sent[0] + 64 * len(expected)
    for taken in (first, second, third):
        assert sorted(name for name, _ in taken) == sorted(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in taken)


def test_a_tensor_that_is_changed_on_its_way_is_named() -> None:
    ports = [free_port("127.0.0.1") for _ in range(3)]
    *_, first, second, third = run_distributed_test(exchange_stripes, 6, ports, 1 << 22, True)
    assert first == second == third and "large arrived with other bytes" in first


@pytest.mark.parametrize("sizes", [[], [1], [100, 200], [5 << 20, 7, 1 << 20], [3, 3, 3]])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_stripes_cover_every_byte_once(sizes: list[int], count: int) -> None:
    covered = [torch.zeros(size) for size in sizes]
    for index in range(count):
        for payload, start, end in pieces(sizes, Stripe(index, count)):
            assert 0 <= start < end <= sizes[payload]
            covered[payload][start:end] += 1
    assert all((row == 1).all() for row in covered)


def test_senders_are_spread_over_the_ranks_of_each_stage() -> None:
    def senders(pp_rank: int, pp_size: int, max_senders: int) -> list[tuple[int, int]]:
        """(replica, tp_rank) of the senders of a stage with tp 4 × 6 replicas, in their order."""
        roles = {(r, t): role_in_stage(pp_rank, pp_size, t, 4, r, 6, max_senders) for r in range(6) for t in range(4)}
        chosen = {place: role.sender for place, role in roles.items() if role.sender is not None}
        assert {role.num_senders for role in roles.values()} == {len(chosen)}
        assert [place for place, role in roles.items() if role.is_driver] == ([(0, 0)] if pp_rank == 0 else [])
        assert {r for (r, _), role in roles.items() if role.takes_part} == {r for r, _ in chosen}
        assert sorted(chosen.values()) == list(range(len(chosen)))
        return sorted(chosen, key=chosen.__getitem__)

    assert senders(0, 1, 100) == [(r, t) for r in range(6) for t in range(4)]
    assert senders(0, 1, 6) == [(r, 0) for r in range(6)]
    assert senders(0, 1, 8) == [(0, 0), (0, 3), (1, 2), (2, 1), (3, 0), (3, 3), (4, 2), (5, 1)]
    assert senders(1, 2, 6) == [(0, 0), (2, 0), (4, 0)]
    assert senders(3, 4, 1) == [(0, 0)]


@pytest.mark.parametrize(
    ("ep", "replicas"), [(1, [0, 4]), (2, [0, 4]), (8, [0, 1, 4, 5]), (16, [0, 1, 2, 3, 4, 5, 6, 7])]
)
def test_ranks_that_share_experts_with_a_sender_take_part(ep: int, replicas: list[int]) -> None:
    roles = {r: [role_in_stage(0, 1, t, 4, r, 8, 2, ep).takes_part for t in range(4)] for r in range(8)}
    assert [r for r, parts in roles.items() if any(parts)] == replicas
    assert all(all(parts) for r, parts in roles.items() if r in replicas), "whole tensor-parallel groups"


def test_a_checksum_notices_what_changed() -> None:
    tensor = torch.arange(10, dtype=torch.bfloat16)
    same, moved, other = tensor.clone(), tensor.flip(0), tensor.clone()
    other[3] += 1
    assert checksum(same) == checksum(tensor)
    assert len({checksum(tensor), checksum(moved), checksum(other)}) == 3
    odd = torch.arange(11, dtype=torch.uint8)
    assert checksum(odd[1:]) == checksum(odd[1:].clone()) != checksum(odd[:-1])


def stall(port: int) -> str:
    """Receiver 1 takes one bucket and then nothing until the sender has given up; how the others end."""
    rank = int(os.environ["RANK"])
    store = torch.distributed.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False)
    group = join_group(store, rank, 2, "gloo", CPU, 2.0, "127.0.0.1", "secret")
    try:
        if rank == 0:
            send(group, iter([(f"t{i}", torch.zeros(1 << 22)) for i in range(8)]), 1 << 20)
        else:
            next(receive([[group]]))
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
    points = [
        MeetingPoint(1, 0, "10.0.0.3", 72),
        MeetingPoint(0, 1, "10.0.0.2", 71),
        MeetingPoint(0, 0, "10.0.0.1", 70),
    ]
    stages = streams_of(targets, points)[1]
    assert [[(s.address, s.port, s.first_rank, s.world_size) for s in senders] for senders in stages] == [
        [("10.0.0.1", 70, 2, 8), ("10.0.0.2", 71, 1, 8)],  # each sender's chain begins at another engine
        [("10.0.0.3", 72, 4, 8)],
    ]
    store = serve_store("127.0.0.1", 5.0)
    assert store.port > 0


def test_the_meeting_point_of_a_push_listens_on_its_address_alone() -> None:
    store = serve_store("127.0.0.2", 10)
    reach_store("127.0.0.2", store.port, 10).set("word", "here")
    assert store.get("word") == b"here"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port), 5)
