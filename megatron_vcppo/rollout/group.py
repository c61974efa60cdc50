"""The process group of a push: one sender, its receivers, and a deadline on everything that they wait for.

A peer that is lost or hangs costs the push, never a process, and leaves nothing behind that the next push, or other
work on the GPU, would wait for. gloo gives deadlines to every operation. NCCL does not:

- ``TORCH_NCCL_BLOCKING_WAIT`` around the constructor makes ``wait(timeout)`` poll, abort the communicator and raise.
  Without it a watchdog thread ends the whole process after a time-out or a lost peer, in the trainer and in every other
  engine. The variable is read by the constructor, so that the trainer's own groups keep their watchdog.
- The communicator is made by the first broadcast, in a call (ncclCommInitRank) that ends only when all ranks are there.
  First all ranks meet in the store, under the deadline; a peer that hangs between that and the call holds the call up
  in a thread that is abandoned at the deadline. NCCL's own non-blocking start has one deadline per process, read once
  from the environment.
- What hangs, hangs on a separate stream (``Lane``).

vLLM's StatelessProcessGroup with PyNcclCommunicator is no way out: it makes its communicator by the same call without
a deadline, has no time-out or abort in its collectives, and would bring vLLM into the trainer.
"""

import datetime
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from typing_extensions import override

from megatron_vcppo.config.network import listen
from megatron_vcppo.run.secret import hello_key, prove, prove_members, seen_key

T = TypeVar("T")
log = logging.getLogger(__name__)
PUSH = "a weight push"
"""Name of the group in messages and proofs."""
ABORT_TIMEOUT_S = 10.0
"""What ending a communicator may take."""
PASSING = 4
"""Tensors that a receiver over gloo may have taken and not yet given to the next one."""


class Lane:
    """A stream on one device. Example: ``with lane.entered(): group.wait(work)``, in any thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Device and stream of the calling thread are the lane's: a new thread's are GPU 0 and its default stream."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def follow(self) -> None:
        """What the lane does from now on comes after what the calling thread's stream was given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors made in the lane may be used on the calling thread's stream.

        That stream waits for what fills them, and their memory is given to a later tensor of the lane only when that
        stream has passed the point at which they are freed.
        """
        if self.stream is None:
            return
        user = torch.cuda.current_stream(self.device)
        user.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(user)

    def finish(self) -> None:
        """Wait until the lane has done what it was given."""
        if self.stream is not None:
            self.stream.synchronize()


class Deadline:
    """A moment that several waits share."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.moment = seconds, time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until then; at least a little, so that what is there already can be taken."""
        return max(0.01, self.moment - time.monotonic())

    def left(self) -> datetime.timedelta:
        """The same for torch."""
        return datetime.timedelta(seconds=self.left_s())


class Transfer(Protocol):
    """A tensor on its way: a ``dist.Work``, or a ``Passed``."""

    def wait(self, timeout: datetime.timedelta) -> bool:
        """False, or RuntimeError, if it has not arrived by then."""


class Passed(Transfer):
    """A tensor that goes along the chain of a gloo group's ranks: from the one before to the one after.

    gloo's own broadcast has the sender send one copy after the other. In a chain every link carries each byte once, and
    a receiver passes a piece on while it takes the next one, as NCCL's broadcast does.
    """

    def __init__(self, group: "Group", tensor: torch.Tensor) -> None:
        self.group, self.tensor = group, tensor
        self.taking = group.process_group.recv([tensor], group.rank - 1, 0) if group.rank else None
        self.giving = None if group.rank else self._give()

    @override
    def wait(self, timeout: datetime.timedelta) -> bool:
        """The sender's wait ends when the first receiver has it, a receiver's when it may be read."""
        if self.taking is None:
            return self.giving is None or self.giving.wait(timeout)
        if not self.taking.wait(timeout):
            return False
        if (giving := self._give()) is not None:
            self.group.passing.append(giving)
            while len(self.group.passing) > PASSING:
                if not self.group.passing.popleft().wait(timeout):
                    return False
        return True

    def _give(self) -> dist.Work | None:
        group = self.group
        return group.process_group.send([self.tensor], group.rank + 1, 0) if group.rank + 1 < group.size else None


@dataclass
class Group:
    """One sender (rank 0) and its receivers."""

    process_group: Any
    """A ProcessGroupGloo or ProcessGroupNCCL, which have no collectives in torch's stubs."""
    lane: Lane
    """Of the group's device: CPU for gloo."""
    deadline: Deadline
    """Of the push under way; a later push sets its own."""
    store: dist.Store
    """Held: a process group does not keep its store alive."""
    rank: int
    size: int
    passing: deque[dist.Work] = field(default_factory=deque)
    """What a receiver over gloo has taken and still gives to the next one."""

    @property
    def device(self) -> torch.device:
        """The device on which tensors must be."""
        return self.lane.device

    def broadcast(self, tensor: torch.Tensor) -> Transfer:
        """Start sending (rank 0) or filling (the others) a contiguous tensor of any shape on this group's device.

        All ranks wait for their transfers in the order in which they started them.
        """
        if self.device.type == "cpu":
            return Passed(self, tensor)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self.deadline.left()
        self.lane.follow()
        with self.lane.entered():
            return self.process_group.broadcast([tensor], options)

    def wait(self, transfer: Transfer) -> None:
        """Wait until the sender may change the tensor, or a receiver read it.

        Raises RuntimeError at the deadline or if a peer is lost.
        """
        with self.lane.entered():
            self._in_time(transfer)
            self.lane.finish()

    def gather(self, mine: bytes) -> list[bytes]:
        """What every rank gives, all as long, by rank. Raises as ``wait``."""
        own = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        options = AllgatherOptions()
        options.timeout = self.deadline.left()
        self.lane.follow()
        with self.lane.entered():
            self._in_time(self.process_group.allgather([found], [own], options))
            self.lane.finish()
        return [bytes(one.tolist()) for one in found]

    def settle(self) -> None:
        """Wait until the next receiver has everything that this one took. Raises as ``wait``."""
        while self.passing:
            self._in_time(self.passing.popleft())

    def _in_time(self, transfer: Transfer) -> None:
        if not transfer.wait(self.deadline.left()):
            raise RuntimeError(f"broadcast not finished {self.deadline.seconds:.3g} s after the push began")

    def close(self) -> None:
        """Leave the group; ends what hangs in it. The peers notice at their next operation. Raises nothing.

        A communicator that does not end is left to its thread: whoever closes a group has an error to report already.
        """
        if self.device.type == "cuda":  # gloo has none of this: its operations end at their deadline
            try:
                run_within(ABORT_TIMEOUT_S, "ending the NCCL communicator", self.process_group.abort)
            except Exception as error:
                log.warning("%s", error)


def serve_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The meeting point of a new group, on a free port of address alone; its ``port`` is told to the receivers."""
    timeout = datetime.timedelta(seconds=timeout_s)
    listener = listen(address)
    port = listener.getsockname()[1]
    fd = listener.detach()  # the store closes it
    return dist.TCPStore(
        address, port, None, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd
    )


def reach_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A receiver's connection to the meeting point, which is served before receivers are told of it.

    Raises RuntimeError at once if nobody listens there: the sender is gone. TCPStore alone would try again until
    timeout_s, and so long the engine would be of no use to the next attempt.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        raise RuntimeError(f"the sender of the push, at {address}:{port}, is gone: {error}") from None
    return dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


def join_group(
    store: dist.TCPStore,
    rank: int,
    world_size: int,
    backend: str,
    device: torch.device,
    timeout_s: float,
    address: str,
    secret: str,
) -> Group:
    """Make the group; returns when all ranks are there and connected. Raises as ``meet``, RuntimeError after timeout_s.

    address: this process's address on the network that the weights take (gloo; NCCL is told by its environment).
    secret: which all of them hold (run/secret.py).
    """
    deadline = Deadline(timeout_s)
    prefixed = dist.PrefixStore(meet(store, rank, world_size, deadline, secret), store)
    lane = Lane(device if backend == "nccl" else torch.device("cpu"))
    make = {"gloo": _make_gloo, "nccl": _make_nccl}[backend]

    def connect() -> Group:
        with lane.entered():
            process_group = make(prefixed, rank, world_size, deadline, address)
            group = Group(process_group, lane, deadline, store, rank, world_size)
            prove_members(group.gather, secret, PUSH, rank)  # NCCL connects in the first operation
        return group

    return run_within(deadline.left_s(), f"connecting {world_size} ranks over {backend}", connect)


def meet(store: dist.Store, rank: int, world_size: int, deadline: Deadline, secret: str) -> str:
    """Wait until every rank has come to the store and proved that it holds the secret; returns the group's prefix.

    Raises RuntimeError on rank 0 with the ranks that are missing, UserError if one does not hold the secret.
    """
    try:
        return prove(store, secret, PUSH, rank, world_size, deadline.left)
    except dist.DistError as error:
        if rank:
            raise RuntimeError(f"not all ranks of the push met within {deadline.seconds:.3g} s: {error}") from None
        peers = range(1, world_size)
        missing = [peer for peer in peers if not store.check([hello_key(peer)])]
        missing = missing or [peer for peer in peers if not store.check([seen_key(peer)])]
        names = ", ".join(map(str, missing))
        raise RuntimeError(
            f"receivers {names} of {world_size - 1} did not connect within {deadline.seconds:.3g} s"
        ) from None


def run_within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """The result of ``work``, run in a new thread. Raises RuntimeError after ``seconds`` and abandons the thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=what, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise RuntimeError(f"{what} is not done after {seconds:.1f} s") from None


def _make_gloo(store: dist.Store, rank: int, world_size: int, deadline: Deadline, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # another class than the stubs' Options
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = deadline.left()
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _make_nccl(store: dist.Store, rank: int, world_size: int, deadline: Deadline, address: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = deadline.left()
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, as long as a constructor needs to read it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
