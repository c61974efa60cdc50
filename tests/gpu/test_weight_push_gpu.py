"""The push's process group over NCCL: deadlines and faults cost the push, never this process. Needs one GPU."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_vcppo.rollout.broadcast import ahead, send
from megatron_vcppo.rollout.group import Group, Lane, join_group, reach_store, serve_store
from megatron_vcppo.run.secret import hello_key

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

PEER = """
import sys, time, torch
from megatron_vcppo.rollout.group import join_group, meet, reach_store, Deadline
port, what = int(sys.argv[1]), sys.argv[2]
store = reach_store("127.0.0.1", port, 60.0)
if what == "hang":
    meet(store, 1, 2, Deadline(60.0), "secret")
    time.sleep(60)
try:
    join_group(store, 1, 2, "nccl", torch.device("cuda", 0), 60.0, "127.0.0.1", "secret")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def join_alone(timeout_s: float = 60.0) -> Group:
    return join_group(serve_store("127.0.0.1", timeout_s), 0, 1, "nccl", device(), timeout_s, "127.0.0.1", "secret")


def start_peer(port: int, what: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # with what was added in this process
    return subprocess.Popen([sys.executable, "-c", PEER, str(port), what], env=env, stdout=subprocess.PIPE, text=True)


def test_a_stream_to_nobody_is_sent_over_nccl() -> None:
    group = join_alone()
    assert isinstance(group.process_group, torch.distributed.ProcessGroupNCCL)
    tensors = [(f"t{i}", torch.randn(1 << 20, device=device())) for i in range(8)]
    assert send(group, iter(tensors), 8 << 20) == 8 * 4 << 20
    group.close()
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ


def test_a_peer_that_never_connects_is_reported_at_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="receivers 1 of 1 did not connect within 2 s"):
        join_group(serve_store("127.0.0.1", 10.0), 0, 2, "nccl", device(), 2.0, "127.0.0.1", "secret")
    assert time.monotonic() - started < 4
    join_alone().close()


def test_a_peer_that_hangs_while_connecting_costs_the_push_only() -> None:
    """It meets, then never makes its communicator: ncclCommInitRank here has no end of its own."""
    store = serve_store("127.0.0.1", 60.0)
    peer = start_peer(store.port, "hang")
    try:
        reach_store("127.0.0.1", store.port, 60.0).wait([hello_key(1)])
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="connecting 2 ranks over nccl is not done"):
            join_group(store, 0, 2, "nccl", device(), 5.0, "127.0.0.1", "secret")
        assert time.monotonic() - started < 8
    finally:
        peer.kill()
        peer.wait()
    ones = torch.ones(1 << 20, device=device())
    assert float(ones.sum()) == 1 << 20, "the caller's stream must not wait for what hangs"
    group = join_alone()
    send(group, iter([("t", ones)]), 1 << 20)
    group.close()


def test_two_ranks_on_one_gpu_are_an_error_not_a_hang() -> None:
    """Why cluster.engines_on: trainer_gpus never takes NCCL."""
    store = serve_store("127.0.0.1", 60.0)
    peer = start_peer(store.port, "join")
    try:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)duplicate gpu|invalid usage|not done"):
            join_group(store, 0, 2, "nccl", device(), 30.0, "127.0.0.1", "secret")
        assert time.monotonic() - started < 35
    finally:
        peer.kill()
        peer.wait()


def test_the_receiving_thread_is_on_the_callers_device_and_a_stream_of_its_own() -> None:
    lane = Lane(device())
    seen = {}

    def buckets():
        for i in range(200):
            seen[threading.current_thread().name] = (
                torch.cuda.current_device(),
                torch.cuda.current_stream().cuda_stream,
            )
            yield [([], torch.full((1 << 22,), i, device=lane.device, dtype=torch.int32))]

    copies = []
    for bucket in ahead(buckets(), lane):
        torch.cuda._sleep(2_000_000)  # the copy below is queued long before it runs
        copies.append(bucket[0][1][:16].clone())
    assert [int(copy[0]) for copy in copies] == list(range(200)), "a payload was overwritten while it was copied"
    ((own_device, own_stream),) = seen.values()
    assert own_device == lane.device.index and own_stream != torch.cuda.current_stream().cuda_stream


def test_a_worker_on_another_gpu_opens_no_context_on_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    code = (
        "import torch; from megatron_vcppo.rollout.broadcast import ahead\n"
        "from megatron_vcppo.rollout.group import Lane\n"
        "torch.cuda.set_device(1); lane = Lane(torch.device('cuda', 1))\n"
        "make = lambda: (yield [([], torch.ones(4, device=lane.device))])\n"
        "list(ahead(make(), lane)); assert not torch._C._cuda_hasPrimaryContext(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
