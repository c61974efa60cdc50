"""The launcher of ranks itself: results in order, and a failure of any kind ends soon and says where."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import RanksFailed, run_distributed_test


def _join_group() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def _sum_of_ranks(offset: int) -> torch.Tensor:
    total = torch.tensor([float(_join_group() + offset)], requires_grad=True)
    (total * 2).sum().backward()  # autograd works in a fork whose parent used it
    dist.all_reduce(total.grad)
    result = total.detach().clone()
    dist.all_reduce(result)
    return result


def _one_rank_raises() -> None:
    rank = _join_group()
    if rank == 1:
        raise ValueError("rank 1 does not like this")
    dist.barrier()


def _one_rank_skips_a_collective() -> None:
    if _join_group() == 0:
        time.sleep(60)
    print("entering the collective")
    dist.all_reduce(torch.ones(1))


def _one_rank_is_killed() -> None:
    if _join_group() == 1:
        os.kill(os.getpid(), 9)
    time.sleep(60)


def test_results_come_in_rank_order() -> None:
    torch.ones(3, requires_grad=True).sum().backward()
    results = run_distributed_test(_sum_of_ranks, 3, 10)
    assert [result.item() for result in results] == [33.0, 33.0, 33.0]
    assert run_distributed_test(lambda: int(os.environ["RANK"]), 2) == [0, 1]


def test_an_exception_is_reported_with_its_rank() -> None:
    with pytest.raises(RanksFailed, match="rank 1 does not like this"):
        run_distributed_test(_one_rank_raises, 2, timeout_s=3600)


def test_a_desync_fails_within_its_deadline_and_shows_the_stack() -> None:
    with pytest.raises(RanksFailed, match="rank 0: still running after 3 s") as failure:
        run_distributed_test(_one_rank_skips_a_collective, 2, timeout_s=3)
    assert "in all_reduce" in str(failure.value) and "entering the collective" in str(failure.value)


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(RanksFailed, match="rank 1: exit code -9"):
        run_distributed_test(_one_rank_is_killed, 2)
