"""Values between ranks: what arrives is data of a known type."""

import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from megatron_vcppo.mcore.rank_messages import broadcast_value, gather_values
from tests.helpers.distributed import run_distributed_test
from tests.helpers.source import modules

VALUES = [{}, {"a": {"bytes": 2**40, "sha": "é" * 1000}}, {"b": {}}]


def _values() -> tuple[Any, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told = broadcast_value(["x", "yz"] if rank == 2 else [], list[str], 2)
    return told, gather_values(VALUES[rank], dict[str, dict[str, Any]])


def test_every_rank_reads_what_one_says_and_the_main_rank_what_all_say() -> None:
    assert run_distributed_test(_values, 3) == [(["x", "yz"], VALUES), (["x", "yz"], None), (["x", "yz"], None)]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _attack(mark: Path) -> str:
    dist.init_process_group("gloo")
    value = pickle.dumps(Payload(mark)) if dist.get_rank() else b""
    try:
        broadcast_value(value, list[str], 1)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def test_what_arrives_is_not_run(tmp_path: Path) -> None:
    assert all("Expected `array`" in error for error in run_distributed_test(_attack, 2, tmp_path / "mark"))
    assert not (tmp_path / "mark").exists()


PICKLING = ("gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list")
EXCEPTIONS = {"rank_role.py"}
"""weight_sync/rank_role.py: the exchange of engines' states and rollouts, between ranks that know each other."""


@pytest.mark.parametrize("path", list(modules("megatron_vcppo")), ids=lambda path: path.stem)
def test_no_other_module_unpickles_what_ranks_send(path: Path) -> None:
    found = [name for name in PICKLING if f"dist.{name}(" in path.read_text() or f"all_{name}(" in path.read_text()]
    assert bool(found) == (path.name in EXCEPTIONS), found
