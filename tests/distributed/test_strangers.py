"""Processes without the run's secret reach the port of a store: they get into no group of the run."""

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.config.network import listen
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.group_members import prove_groups_within
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.mcore.ranks_store import ranks_store
from megatron_vcppo.rollout.group import PUSH, Deadline, Group, Lane, _make_gloo, join_group, reach_store, serve_store
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE, hello_key, make_secret, prove, seen_key
from tests.helpers.distributed import run_distributed_test

CPU = torch.device("cpu")


def in_time() -> timedelta:
    return timedelta(seconds=20)


def meet(secrets: dict[int, str], groups: dict[int, str] | None = None) -> list[Any]:
    """What ``prove`` gives each rank, which holds its secret, or the UserError of it."""
    store = dist.HashStore()
    results: list[Any] = [None] * len(secrets)

    def rank(number: int) -> None:
        try:
            results[number] = prove(
                store, secrets[number], (groups or {}).get(number, "x"), number, len(secrets), in_time
            )
        except UserError as error:
            results[number] = error
            for peer in secrets:
                store.set(f"answer/{peer}", "")  # nobody waits longer
                store.set(seen_key(peer), "")

    threads = [threading.Thread(target=rank, args=(number,)) for number in secrets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_holders_of_the_secret_meet_under_a_prefix_of_their_own() -> None:
    first, second = meet(dict.fromkeys(range(3), "s")), meet(dict.fromkeys(range(3), "s"))
    assert len({*first}) == len({*second}) == 1 and first[0] != second[0]


def test_another_secret_or_group_is_refused_by_rank_0_and_by_its_peer() -> None:
    for results in (meet({0: "s", 1: "t"}), meet({0: "s", 1: "s"}, {1: "y"})):
        assert all(isinstance(error, UserError) for error in results)
        assert "rank 1 of x does not hold the run's secret: a stranger has taken its place" in str(results[0])
        assert str(results[1]).startswith("rank 0 of ")


def test_a_proof_is_good_once() -> None:
    """A stranger repeats what a rank wrote into an earlier store."""
    earlier, later = dist.HashStore(), dist.HashStore()
    peer = threading.Thread(target=prove, args=(earlier, "s", "x", 1, 2, in_time))
    peer.start()
    prove(earlier, "s", "x", 0, 2, in_time)
    peer.join(20)
    later.set(hello_key(1), earlier.get(hello_key(1)).decode())
    with pytest.raises(UserError, match="rank 1 of x does not hold"):
        prove(later, "s", "x", 0, 2, in_time)


class AnsweredByAStranger:
    """What a rank reads of a store in which a stranger has answered before rank 0."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.set = store, store.set

    def get(self, key: str) -> bytes:
        return b"0" * 64 if key == "answer/1" else self.store.get(key)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        if keys != ["answer/1"]:
            self.store.wait(keys, timeout)


def test_rank_0_does_not_go_on_where_a_stranger_answered_in_its_place() -> None:
    """The rank gives its proof and then turns away: its place must not be free for who finds the group's prefix."""
    store = dist.HashStore()
    turned_away: list[UserError] = []

    def rank_1() -> None:
        try:
            prove(AnsweredByAStranger(store), "s", "x", 1, 2, in_time)
        except UserError as error:
            turned_away.append(error)

    peer = threading.Thread(target=rank_1)
    peer.start()
    with pytest.raises(dist.DistError):
        prove(store, "s", "x", 0, 2, lambda: timedelta(seconds=2))
    peer.join(20)
    assert "rank 0 of x does not hold" in str(*turned_away)


def _world(folder: Path, stranger: Path | None) -> Any:
    """Ranks 0 and 1 are the run's, where ``stranger`` is None; else rank 1 holds the secret of that file instead."""
    rank = int(os.environ["RANK"])
    os.environ[SECRET_FILE_VARIABLE] = str(stranger if stranger and rank else folder / "secret")
    try:
        runtime.start(ParallelConfig(), seed=0, timeout_s=20)
    except UserError as error:
        return str(error)
    except dist.DistError:
        return "rank 0 is gone"
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def test_the_trainers_ranks_meet_by_their_secret(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    assert run_distributed_test(_world, 2, tmp_path, None) == [2, 2]


def test_a_stranger_who_takes_a_rank_is_refused_in_one_line(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    make_secret(tmp_path / "other")
    main, other = run_distributed_test(_world, 2, tmp_path, tmp_path / "other")
    assert main.startswith("rank 1 of the trainer's world does not hold the run's secret") and "\n" not in main
    assert other == "rank 0 is gone" or other.startswith("rank 0 of the trainer's world")


def _groups_with_a_stranger(folder: Path, prove_again: Callable[[], object]) -> str:
    """Rank 3 holds another secret from the moment on in which groups within the world are connected."""
    os.environ[SECRET_FILE_VARIABLE] = str(folder / "secret")
    runtime.start(ParallelConfig(tp=2, pp=2), seed=0, timeout_s=20)
    if os.environ["RANK"] == "3":
        os.environ[SECRET_FILE_VARIABLE] = str(folder / "other")
    try:
        prove_again()
    except UserError as error:
        return str(error)
    except (RuntimeError, dist.DistError):
        return "a peer is gone"
    return "went on"


@pytest.mark.parametrize(
    ("prove_again", "group"),
    [(prove_groups_within, "the trainer's group of ranks"), (partial(RankGroup, 20), "a group of all ranks")],
    ids=["Megatron's", "ours"],
)
def test_a_stranger_in_a_group_within_the_world_is_refused(
    prove_again: Callable[[], object], group: str, tmp_path: Path
) -> None:
    make_secret(tmp_path / "secret")
    make_secret(tmp_path / "other")
    results = run_distributed_test(_groups_with_a_stranger, 4, tmp_path, prove_again)
    assert "went on" not in results
    assert re.search(rf"rank \d of {group}.* does not hold the run's secret: a stranger", results[2])


def _world_beside_a_joiner(folder: Path) -> Any:
    """Process 2 joins as torch has it, as rank 1, before the run's rank 1 comes; the payload would run code."""
    process, address, port = int(os.environ["RANK"]), "127.0.0.1", int(os.environ["MASTER_PORT"])
    joined = folder / "joined"
    if process == 2:
        store = dist.TCPStore(address, port, None, False, timeout=timedelta(seconds=20), wait_for_workers=False)
        joined.touch()
        with suppress(RuntimeError):
            dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=3))
            return "in"
        return "out"
    while process == 1 and not joined.exists():
        threading.Event().wait(0.02)
    os.environ["WORLD_SIZE"] = "2"
    result = _world(folder, None)
    while process == 0 and not (folder / "done").exists():  # the store lives here
        threading.Event().wait(0.02)
    (folder / "done").touch()
    return result


def test_who_joins_the_store_without_a_proof_is_no_rank(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    assert run_distributed_test(_world_beside_a_joiner, 3, tmp_path) == [2, 2, "out"]


def test_a_stranger_who_serves_the_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_secret(tmp_path / "secret")
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    theirs = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
    theirs.set("challenge", "0" * 32)
    theirs.set("answer/1", "0" * 64)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "secret"))
    with pytest.raises(UserError, match="rank 0 of the trainer's world does not hold the run's secret"):
        ranks_store(1, 1, timedelta(seconds=20))


def test_a_stranger_gets_no_weights() -> None:
    store = serve_store("127.0.0.1", 20.0)
    stranger = reach_store("127.0.0.1", store.port, 20.0)
    stranger.set(hello_key(1), "number proof")
    with pytest.raises(UserError, match="rank 1 of a weight push does not hold the run's secret"):
        join_group(store, 0, 2, "gloo", CPU, 20.0, "127.0.0.1", "s")


def test_who_takes_a_peers_place_after_the_meeting_is_found_out_in_the_group() -> None:
    """A store lists its keys to everybody, so a stranger finds the group's prefix once all have met."""
    store = serve_store("127.0.0.1", 20.0)
    errors: list[Exception] = []

    def rank_0() -> None:
        try:
            join_group(store, 0, 2, "gloo", CPU, 20.0, "127.0.0.1", "s")
        except UserError as error:
            errors.append(error)

    sender = threading.Thread(target=rank_0)
    sender.start()
    prove(reach_store("127.0.0.1", store.port, 20.0), "s", PUSH, 1, 2, in_time)  # the receiver, which goes no further
    theirs: Any = reach_store("127.0.0.1", store.port, 20.0)
    while not (found := re.search(r"[0-9a-f]{64}(?=/)", " ".join(theirs.list_keys()))):
        assert sender.is_alive()
    group = Group(
        _make_gloo(dist.PrefixStore(found.group(), theirs), 1, 2, Deadline(20.0), "127.0.0.1"),
        Lane(CPU), Deadline(20.0), theirs, 1, 2,
    )  # fmt: skip
    group.gather(bytes(32))
    group.gather(bytes(32))
    sender.join(20)
    (error,) = errors
    assert "rank 1 of a weight push does not hold the run's secret: a stranger has taken its place" in str(error)
