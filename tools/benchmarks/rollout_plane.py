"""The work around the models in one PPO iteration, at any size: seconds that training waits, bytes, memory per rank.

One rank does its real work, a replica's leader or another rank of it; a second process stands for all other ranks: it
takes every byte that the rank sends and sends it every byte that it would get, over gloo. Models cost nothing here.
``cpu_s``: the processor time of the rank in the seconds that training waits, which a busy machine disturbs less; what
leaders write in the background meanwhile is in it.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vcppo.algo.gae import decoupled_gae
from megatron_vcppo.config import AdvantageConfig, PolicyLossConfig, PpoConfig, ReturnsConfig, ValuesConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.rollout_share import ROW, ModelOutputs, rows_of
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.mcore import row_exchange, runtime
from megatron_vcppo.mcore.learner import StepResult
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.rollout_store import write_rollouts
from megatron_vcppo.stages.advantage_batch import compute_advantages
from megatron_vcppo.stages.ppo_models import token_outputs
from megatron_vcppo.stages.share_exchange import share_out
from megatron_vcppo.stages.updates import UpdateMetrics, Updater
from megatron_vcppo.weight_sync.joiners import begin
from tools.benchmarks._measure import peak_bytes

SEND, TAKE, SWAP, END = range(4)
"""What the measured rank tells the other process: it sends bytes, takes bytes, does both at once, or is done."""
PROMPT_TOKENS = 128
CHARACTERS_PER_TOKEN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the batch and of the cluster."""
    parser.add_argument("--rollouts", type=int, default=8192, help="responses per iteration (8192)")
    parser.add_argument("--tokens", type=int, default=16384, help="longest response; lengths are uniform (16384)")
    parser.add_argument("--samples", type=int, default=16, help="responses per prompt (16)")
    parser.add_argument("--minibatches", type=int, default=16)
    parser.add_argument("--dp", type=int, default=16, help="replicas (16)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 1024], help="ranks of the trainer (128 1024)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A leader, then another rank of its replica, for each number of ranks."""
    one = torch.zeros(1, 1)
    decoupled_gae(rewards=one, values=one, mask=one == 0, gamma=1.0, lam_actor=1.0, lam_critic=1.0)  # compiles, for all
    for num_ranks in args.ranks:
        for is_leader in (True, False):
            yield measure(args, num_ranks // args.dp, is_leader)


def measure(args: argparse.Namespace, replica_size: int, is_leader: bool) -> dict[str, Any]:
    """In separate processes: one case's memory is not another's."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        receiver, result = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_measured_rank, args=(args, replica_size, is_leader, Path(name), result)),
            context.Process(target=_all_others, args=(Path(name),)),
        ]
        for rank in ranks:
            rank.start()
        while not receiver.poll(1.0):
            if not all(rank.is_alive() for rank in ranks):
                raise SystemExit("rollout_plane: a process died; its error is above")
        found = receiver.recv()
        for rank in ranks:
            rank.join(60)
    return {"case": "rollout_plane", "ranks": replica_size * args.dp, "dp": args.dp, **found}


def _join(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)


def _all_others(folder: Path) -> None:
    """The process that stands for all other ranks."""
    _join(folder, 1)
    while True:
        told = torch.zeros(3, dtype=torch.int64)
        dist.recv(told, 0)
        what, num_taken, num_sent = told.tolist()
        taken, sent = torch.zeros(num_taken, dtype=torch.uint8), torch.zeros(num_sent, dtype=torch.uint8)
        if what == END:
            return
        if what == SWAP:
            dist.all_to_all_single(taken, sent, [num_taken, 0], [num_sent, 0])
        elif what == SEND:
            dist.recv(taken, 0)
        else:
            dist.send(sent, 0)


@dataclass
class Wire:
    """Collectives of ``row_exchange`` among many ranks, as one of them sees them, with the one that stands for all."""

    batch: np.ndarray
    """ROW [B]: what all leaders have, by leader."""
    rows_per_leader: int
    dp_size: int
    replica_size: int
    is_leader: bool
    sent: int = 0
    received: int = 0
    gathers: int = field(default=0, init=False)

    def tell(self, what: int, num_sent: int = 0, num_taken: int = 0) -> None:
        """The other process takes part in what follows."""
        self.sent, self.received = self.sent + num_sent, self.received + num_taken
        dist.send(torch.tensor([what, num_sent, num_taken]), 1)

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, taken_from: list[int], given_to: list[int], group: Any
    ) -> None:
        """This is replica 0, so what it keeps comes first on both sides."""
        size = sent.element_size()
        given, taken = sum(given_to[1:]) * size, sum(taken_from[1:]) * size
        self.tell(SWAP, given, taken)
        kept = given_to[0] * size
        dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), [kept, taken], [kept, given])

    def all_gather_into_tensor(self, gathered: Tensor, mine: Tensor, group: Any) -> None:
        """In a ring: every rank sends on what it has got, but for the last piece."""
        piece, others = mine.numel() * mine.element_size(), self.dp_size - 1
        self.tell(SWAP, others * piece, others * piece)
        taken, given = (torch.empty(others * piece, dtype=torch.uint8) for _ in range(2))
        dist.all_to_all_single(taken, given, [0, others * piece], [0, others * piece])
        self.fill(gathered)

    def broadcast(self, tensor: Tensor, group_src: int, group: Any) -> None:
        """In a binomial tree: the leader sends to log₂ ranks, the first of which passes it on to one fewer."""
        copies, content = math.ceil(math.log2(self.replica_size)), tensor.view(-1).view(torch.uint8)
        if not self.is_leader:
            copies -= 1
            self.tell(TAKE, 0, content.numel())
            dist.recv(content, 1)
            if tensor.dtype in (torch.uint8, torch.int64):
                self.fill(tensor)
        for _ in range(copies):
            self.tell(SEND, content.numel())
            dist.send(content, 1)

    def fill(self, gathered: Tensor) -> None:
        """The bytes of every leader's rows, or the rows; the other process has no content."""
        if gathered.dtype == torch.int64:
            gathered.fill_(self.rows_per_leader * ROW.itemsize)
        else:
            gathered.view(-1).copy_(torch.from_numpy(self.batch.view(np.uint8)))


class _NoModel:
    """Takes micro-batches and learns nothing."""

    def logprobs(self, microbatches: Any) -> list[Tensor]:
        return [torch.full((m.num_tokens,), -0.5) for m in microbatches]

    def train_step(self, microbatches: Any, loss: Any) -> StepResult:
        return StepResult({"loss": 0.0}, 0.0, 0.0, True)


def _measured_rank(args: argparse.Namespace, replica_size: int, is_leader: bool, folder: Path, result: Any) -> None:
    _join(folder, 0)
    found: dict[str, Any] = {}
    small = argparse.Namespace(**{**vars(args), "rollouts": 8 * args.dp, "tokens": 64, "minibatches": 2})
    _iteration(small, replica_size, is_leader, folder, {})  # what happens once per process
    peak = peak_bytes(lambda: _iteration(args, replica_size, is_leader, folder, found))
    found["peak_memory_mb"] = round(peak / 1e6)
    dist.send(torch.tensor([END, 0, 0]), 1)
    result.send(found)


def _iteration(
    args: argparse.Namespace, replica_size: int, is_leader: bool, folder: Path, found: dict[str, Any]
) -> None:
    seconds: dict[str, float] = {}
    cpu_s = 0.0

    @contextmanager
    def timer(phase: str) -> Iterator[None]:
        nonlocal cpu_s
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
        cpu_s += time.process_time() - cpu_started

    dp_size, per_leader = args.dp, args.rollouts // args.dp
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, args.tokens + 1, args.rollouts)
    part = _rollouts(generator, lengths[:per_leader], args) if is_leader else RolloutPart()
    batch = _table(generator, lengths, args)
    wire = Wire(batch, per_leader, dp_size, replica_size, is_leader)
    if is_leader:
        batch[:per_leader] = rows_of(part)
    row_exchange.dist = wire  # type: ignore[assignment]
    row_exchange.parallel_state = argparse.Namespace(get_data_parallel_group_gloo=lambda: None)
    runtime._runtime = runtime.Runtime(
        rank=0 if is_leader else 1, world_size=dp_size * replica_size, tp_rank=0 if is_leader else 1, pp_rank=0,
        dp_rank=0, cp_rank=0, tp_size=replica_size, pp_size=1, dp_size=dp_size, cp_size=1,
        device=torch.device("cpu"), seed=0, timeout_s=600, replica_group=0,
    )  # fmt: skip
    storing = None
    if is_leader:
        storing = begin(partial(_timed_store, folder, part, seconds))
    with timer("exchange"):
        share = share_out(part)
    del part
    packer, model = Packer(2 * args.tokens, 8, 0, dp_size), _NoModel()
    outputs = {}
    for phase in ("logprobs", "values"):
        with timer(f"packing for {phase}"):
            outputs[phase] = token_outputs(share, packer, model.logprobs)
    model_outputs = ModelOutputs(outputs["logprobs"], share.rollout_logprobs, values=outputs.pop("values"))
    loss, returns = PolicyLossConfig(tis_cap=2.0), ReturnsConfig()
    with timer("advantages"):
        advantages = compute_advantages(
            share, model_outputs, AdvantageConfig(length_adaptive_alpha=0.05), loss, returns_config=returns,
            kl_coef=0.0, max_tokens=args.tokens, end_of_thinking_id=3, total=lambda sums: sums,
        )  # fmt: skip
    learner: Any = model
    updater = Updater(
        actor=learner, critic=learner, packer=packer, config=PpoConfig(loss=loss, minibatches=args.minibatches),
        values_config=ValuesConfig(), returns_config=returns, run_seed=0, max_tokens=args.tokens,
    )  # fmt: skip
    metrics = UpdateMetrics()
    with timer("minibatches"):
        updater.update(share, advantages, model_outputs, iteration=1, kl_coef=0.0, metrics=metrics)
    if storing is not None:
        with timer("waiting for the store"):
            storing.result(600)
    in_background = seconds.pop("store", 0.0)
    found.update(
        role="leader" if is_leader else "other",
        tokens=int(lengths.sum()),
        waits_s=round(sum(seconds.values()), 2),
        cpu_s=round(cpu_s, 2),
        seconds={name: round(value, 2) for name, value in seconds.items()},
        store_in_background_s=round(in_background, 2),
        sent_mb=round(wire.sent / 1e6, 1),
        received_mb=round(wire.received / 1e6, 1),
        imbalance_worst=round(max(metrics.imbalance), 4),
        padding_share=round(metrics.num_padding / metrics.num_tokens, 5),
    )


def _timed_store(folder: Path, part: RolloutPart, seconds: dict[str, float]) -> None:
    started = time.perf_counter()
    write_rollouts(folder, 1, part)
    seconds["store"] = time.perf_counter() - started


def _rollouts(generator: np.random.Generator, lengths: np.ndarray, args: argparse.Namespace) -> RolloutPart:
    """Replica 0's, which has every dp-th prompt."""
    rollouts = []
    for index, length in enumerate(lengths.tolist()):
        number, sample = divmod(index, args.samples)
        prompt = Prompt(f"p:{number * args.dp}", (1,) * PROMPT_TOKENS, "text", "7", "math")
        ids = array("i", generator.integers(0, 150_000, length, dtype=np.int32).tobytes())
        logprobs = array("f", (-generator.random(length, dtype=np.float32)).tobytes())
        text = "x" * (CHARACTERS_PER_TOKEN * length)
        reward = 1.0 if index % 3 else -1.0
        rollouts.append(Rollout(prompt, sample, 0, ids, text, logprobs, "stop", 0, reward, "correct"))
    places = [(i // args.samples * args.dp) * args.samples + i % args.samples for i in range(len(rollouts))]
    return RolloutPart(places, rollouts)


def _table(generator: np.random.Generator, lengths: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """What the leaders have of a batch, by leader."""
    rows = np.zeros(len(lengths), ROW)
    per_leader = len(lengths) // args.dp
    index = np.arange(len(lengths)) % per_leader
    leader = np.arange(len(lengths)) // per_leader
    prompt = index // args.samples * args.dp + leader
    rows["place"], rows["group"] = prompt * args.samples + index % args.samples, prompt
    rows["prompt_length"], rows["response_length"] = PROMPT_TOKENS, lengths
    rows["reward"] = generator.choice([-1.0, 1.0], len(lengths))
    rows["is_correct"] = rows["reward"] > 0
    assert ceil_div(per_leader, args.samples) * args.dp * args.samples >= len(lengths)
    return rows
