"""A rank's world: process groups, device, seeds. Started by anything that sets RANK, WORLD_SIZE and MASTER_*.

A process has one world, because torch and Megatron keep their groups in module globals: ``start`` makes it and
``current`` returns it.
"""

import datetime
import itertools
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.config.placement import data_parallel_size
from megatron_vcppo.mcore import cpu_shim, object_collectives
from megatron_vcppo.mcore.group_members import prove_group, prove_groups_within
from megatron_vcppo.mcore.ranks_store import WORLD, ranks_store

_IGNORED_WARNINGS: tuple[dict[str, Any], ...] = (
    {"module": "megatron"},
    {"message": ".*is deprecated. Please use `torch.distributed", "category": FutureWarning},
    {"message": "Please use DTensor instead", "category": FutureWarning},
)

BEAT_S = 1.0
"""Least time between two signs of life of the main rank."""


@dataclass(frozen=True)
class Runtime:
    """Where this rank stands, and what it was started with.

    ``dp`` counts model replicas; the ``cp`` ranks of one replica share its sequences. ``ep`` neighbors among the ranks
    of a pipeline stage, which may be of several replicas, share the experts of each layer.
    """

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_size: int
    pp_size: int
    dp_size: int
    cp_size: int
    device: torch.device
    seed: int
    timeout_s: float
    """The deadline of every collective, and of any other wait of a rank."""
    ep_size: int = 1
    replica_group: Any = field(default=None, compare=False, repr=False)
    """A gloo group of the replica's ranks, its leader first; None if it is the only one."""
    on_main_calls: Iterator[int] = field(default_factory=itertools.count, init=False, compare=False, repr=False)
    """Numbers the calls of ``on_main``, the same on every rank: each has its own keys in the store."""

    @property
    def is_main(self) -> bool:
        """The one rank that logs and writes manifests."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """The first rank of a replica, which has its rollouts from the engines; the main rank is one."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers of the pipeline, whose output losses read."""
        return self.pp_rank == self.pp_size - 1

    def barrier(self) -> None:
        """Until all ranks are here; collective."""
        # NCCL's barrier is an all-reduce on a device, and warns when it has to guess which one.
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


_runtime: Runtime | None = None
"""What ``start`` made; None outside of a world."""


def device() -> torch.device:
    """This process's compute device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(parallel: ParallelConfig, seed: int, timeout_s: float) -> Runtime:
    """Join the world and build tensor, pipeline, context and data-parallel groups; collective.

    seed: of Python, numpy, torch and Megatron's per-rank generators. timeout_s: bounds every collective from then on.
    Raises UserError if the sizes do not fit the number of ranks. Without CUDA, torch and Megatron are patched
    (cpu_shim.py); Megatron's warnings about parts that this project does not use are ignored.
    """
    global _runtime
    cpu_shim.install()
    object_collectives.install()
    for ignored in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", **ignored)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data_parallel_size(parallel, world_size)  # refuses sizes that do not divide it
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    timeout = datetime.timedelta(seconds=timeout_s)
    store = ranks_store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    prove_group(dist.group.WORLD, WORLD)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,  # an expert is whole: those of today are too narrow to be split
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    replica_group = _replica_group(timeout)
    prove_groups_within()
    _seed_everything(seed)
    _runtime = Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        device=device(),
        seed=seed,
        timeout_s=timeout_s,
        replica_group=replica_group,
    )
    return _runtime


def _replica_group(timeout: datetime.timedelta) -> Any:
    """Megatron has no group over tensor, context and pipeline ranks together; collective over all ranks."""
    inner = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    replicas = parallel_state.get_data_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if inner * stages == 1:
        return None
    # Ranks are numbered by tensor, context, data and pipeline rank, the first fastest.
    members = [
        [inner * (replicas * stage + replica) + i for stage in range(stages) for i in range(inner)]
        for replica in range(replicas)
    ]
    groups = [dist.new_group(ranks, timeout, "gloo") for ranks in members]
    mine = parallel_state.get_data_parallel_rank()
    assert dist.get_rank() in members[mine], f"rank {dist.get_rank()} is not in {members[mine]}"
    return groups[mine]


def current() -> Runtime:
    """This rank's place in the world that ``start`` made."""
    assert _runtime is not None, "runtime.start was not called"
    return _runtime


def on_main(work: Callable[[Callable[[], None]], None], what: str) -> None:
    """Run ``work`` on the main rank while the others wait; collective.

    work is given a function to call whenever it has made progress, from any thread and as often as it likes. The others
    wait as long as that happens within the deadline of ``start``; then they raise TimeoutError naming ``what``. If the
    main rank raises, its process ends, and the others are ended by whoever started them, or by their deadline.
    """
    runtime, store = current(), dist.distributed_c10d._get_default_store()
    key, num_others = f"on_main/{next(runtime.on_main_calls)}", runtime.world_size - 1
    deadline = datetime.timedelta(seconds=runtime.timeout_s)
    if runtime.is_main:
        last_beat = 0.0

        def beat() -> None:
            nonlocal last_beat
            if time.monotonic() - last_beat >= BEAT_S:
                last_beat = time.monotonic()
                store.add(f"{key}/beats", 1)

        work(beat)
        store.set(key, "done")
        if num_others:  # the store lives in this process: it may not end before the others have their answer
            store.wait([f"{key}/seen_by_all"], deadline)
        return
    seen = -1
    while True:
        try:
            store.wait([key], deadline)
            if store.add(f"{key}/seen", 1) == num_others:
                store.set(f"{key}/seen_by_all", "")
            return
        except dist.DistStoreError:
            beats = store.add(f"{key}/beats", 0)
            if beats == seen:
                raise TimeoutError(f"{what} on rank 0 has made no progress for {runtime.timeout_s:g} s") from None
            seen = beats


def any_rank(flag: bool) -> bool:
    """True if ``flag`` is true on any rank; collective."""
    vote = torch.tensor([int(flag)], device=device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def sum_over_ranks(number: int) -> int:
    """The sum of a number over all ranks; collective."""
    total = torch.tensor([number], device=device())
    dist.all_reduce(total)
    return int(total.item())


def max_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """The largest over all ranks of each number, on every rank; collective. numbers: any shape; the result: CPU."""
    largest = numbers.to(device(), copy=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.cpu()


def sum_over_replicas(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over data-parallel replicas, on every rank; collective. tensor: any shape and device; the sum: CPU."""
    summed = tensor.to(device())
    dist.all_reduce(summed, group=parallel_state.get_data_parallel_group())
    return summed.cpu()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave the world; collective in the ordinary case, safe to call twice."""
    global _runtime
    _runtime = None
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
