"""Every wait of a push's process group ends at its deadline, on real gloo ranks, and the next push works."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from megatron_vcppo.config import Config
from megatron_vcppo.rollout import group as group_module
from megatron_vcppo.rollout.broadcast import ahead, receive, send, unpack
from megatron_vcppo.rollout.group import Group, Lane, join_group, reach_store, run_within
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.weight_sync import rank_role
from megatron_vcppo.weight_sync.push_plan import SINGLE, Target
from megatron_vcppo.weight_sync.transport import NetworkTransport
from tests.helpers.distributed import run_distributed_test

CPU = torch.device("cpu")
DEADLINE_S = 2.0
held: list[Any] = []
TARGETS = [Target(Engine(0, i, 0, "127.0.0.1", 5000 + i, 1), 1) for i in range(2)]


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"t{i}", torch.full((1 << 18,), float(i))) for i in range(8))


def join(port: int, rank: int, size: int) -> Group:
    store = reach_store("127.0.0.1", port, DEADLINE_S)
    return join_group(store, rank, size, "gloo", CPU, DEADLINE_S, "127.0.0.1", "secret")


def sender(port: int) -> tuple[str, int]:
    """Rank 0 pushes to two receivers of which the second has a fault, then to the first alone.

    Returns the first error and the bytes of the second push.
    """
    transport = NetworkTransport("127.0.0.1", CPU, 1 << 20, DEADLINE_S, lambda: "secret")
    tell = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    error = ""
    tell.set("first", str(transport.meet(TARGETS)[1]))
    try:
        transport.connect(TARGETS)
        transport.send(tensors(), 1)
    except RuntimeError as problem:
        error = str(problem)
    transport.close()
    tell.set("second", str(transport.meet(TARGETS[:1])[1]))
    transport.connect(TARGETS[:1])
    sent = transport.send(tensors(), 1)
    tell.wait(["taken"])
    return error, sent


def receiver(fault: str, port: int) -> tuple[str, int]:
    """Rank 1 is sound; rank 2 has the fault. What hangs there hangs until the second push is complete: that nobody
    waits for it needs no clock."""
    rank = int(os.environ["RANK"])
    tell = torch.distributed.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    meeting = int(tell.get("first"))
    if rank == 2:
        if fault == "never connects":
            return fault, 0
        if fault == "hangs before it connects":  # it has met the others: its main thread is stopped after that

            def hang(*_: Any) -> NoReturn:
                tell.wait(["taken"])
                raise RuntimeError("the others have given up")

            group_module._make_gloo = hang  # type: ignore[assignment]
            with pytest.raises(RuntimeError):
                join(meeting, 2, 3)
            return fault, 0
        buckets = receive([[join(meeting, 2, 3)]])
        next(buckets)
        if fault == "dies in the middle":
            held.append(buckets)  # what ends it is the process's exit, as if it were killed
            return fault, 0
        tell.wait(["taken"])
        return fault, 0
    error = ""
    try:
        list(receive([[join(meeting, 1, 3)]]))
    except RuntimeError as problem:
        error = str(problem)
    taken = sum(tensor.nbytes for _, tensor in unpack(receive([[join(int(tell.get("second")), 1, 2)]])))
    tell.set("taken", "")
    return error, taken


@pytest.mark.parametrize(
    "fault", ["never connects", "hangs before it connects", "hangs in the middle", "dies in the middle"]
)
def test_a_faulty_receiver_costs_the_push_and_the_next_one_works(fault: str) -> None:
    def rank(port: int) -> tuple[str, int]:
        return receiver(fault, port) if int(os.environ["RANK"]) else sender(port)

    (error, sent), (other_error, taken), _ = run_distributed_test(rank, 3, free_port("127.0.0.1"))
    assert error and other_error, "the fault was not noticed"
    assert sent == taken == 8 << 20
    if fault == "never connects":
        assert "receivers 2 of 2 did not connect within 2 s" in error


def test_a_sender_that_was_killed_before_a_receiver_came_is_not_waited_for() -> None:
    with pytest.raises(RuntimeError, match=r"the sender of the push, at 127.0.0.1:\d+, is gone"):
        reach_store("127.0.0.1", free_port("127.0.0.1"), 60.0)


def test_what_hangs_in_a_thread_is_abandoned_and_named() -> None:
    never = threading.Event()
    with pytest.raises(RuntimeError, match="connecting 3 ranks over nccl is not done"):
        run_within(0.2, "connecting 3 ranks over nccl", never.wait)
    with pytest.raises(TimeoutError, match="of the work"):
        run_within(5, "x", lambda: (_ for _ in ()).throw(TimeoutError("of the work")))
    never.set()


def test_a_communicator_that_does_not_end_is_abandoned_without_an_error(monkeypatch, caplog) -> None:
    """A sender that closes a group after a failed push must live; a receiver must finish its reload."""
    never = threading.Event()
    monkeypatch.setattr(group_module, "ABORT_TIMEOUT_S", 0.1)
    lane = SimpleNamespace(device=torch.device("cuda", 0))
    hanging: Any = SimpleNamespace(abort=never.wait)
    Group(hanging, lane, group_module.Deadline(1.0), torch.distributed.HashStore(), 0, 2).close()  # type: ignore[arg-type]
    never.set()
    assert "ending the NCCL communicator is not done after 0.1 s" in caplog.text


def test_a_sender_gives_up_before_the_watchdog_of_the_ranks_that_wait_for_it(tmp_path: Path) -> None:
    config = Config()
    assert config.weight_sync.timeout_s == config.run.timeout_s == 600
    transport = rank_role._make_transport(config, tmp_path, SINGLE, CPU)
    assert isinstance(transport, NetworkTransport) and transport.timeout_s == 480
    config.weight_sync.timeout_s = 60
    shorter = rank_role._make_transport(config, tmp_path, SINGLE, CPU)
    assert isinstance(shorter, NetworkTransport) and shorter.timeout_s == 60


def slow(port: int) -> str:
    """A receiver takes a bucket every half second: no single wait is long, all together are."""
    if int(os.environ["RANK"]):
        with suppress(RuntimeError):
            for _ in receive([[join(port, 1, 2)]]):
                time.sleep(0.5)
        return ""
    store = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    try:
        send(join_group(store, 0, 2, "gloo", CPU, DEADLINE_S, "127.0.0.1", "secret"), tensors(), 1 << 20)
    except RuntimeError as error:
        return str(error)
    return ""


def test_all_waits_of_a_push_share_one_deadline() -> None:
    error, _ = run_distributed_test(slow, 2, free_port("127.0.0.1"))
    assert error


class RecordingLane(Lane):
    """What a lane is asked for, by thread; a CPU has no streams."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.events: list[tuple[str, str]] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.events.append((threading.current_thread().name, "entered"))
        yield
        self.events.append((threading.current_thread().name, "left"))

    def hand_over(self, tensors) -> None:
        self.events.append((threading.current_thread().name, f"{[int(t[0]) for t in tensors]} handed over"))


def test_the_receiving_thread_works_in_the_lane_and_hands_each_payload_over() -> None:
    lane = RecordingLane()

    def buckets():
        for i in range(3):
            lane.events.append((threading.current_thread().name, f"received {i}"))
            yield [([], torch.tensor([i]))]

    for bucket in ahead(buckets(), lane):
        lane.events.append((threading.current_thread().name, f"used {int(bucket[0][1][0])}"))
    received = [event for thread, event in lane.events if thread == "weights"]
    assert received == ["entered", "received 0", "received 1", "received 2", "left"]
    used = [event for thread, event in lane.events if thread == "MainThread"]
    assert used == [event for i in range(3) for event in (f"[{i}] handed over", f"used {i}")]
