"""Values between ranks: what arrives is data of a known type."""

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.rank_messages import MOST_CHARACTERS, RankGroup, broadcast_value, gather_values
from tests.helpers.distributed import run_distributed_test
from tests.helpers.source import ROOT, modules

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


class Row(msgspec.Struct, frozen=True):
    name: str
    number: int


def _agreements() -> list[Any]:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), RankGroup(30.0)
    ranks.barrier()
    failing = f"rank {rank} " + "x" * MOST_CHARACTERS if rank else ""
    row = Row(f"é{rank}", rank) if rank else None
    return [
        ranks.any(rank == 1, False, rank < 3),
        ranks.sum(rank),
        ranks.tell([Row("a", 7)] if rank == 0 else None, list[Row]),
        [(number, len(text), text[:6]) for number, text in ranks.texts(failing)],
        ranks.texts(""),
        ranks.table(row, 2 - rank, 2, Row),
    ]


def test_ranks_agree_on_what_any_or_all_of_them_know() -> None:
    texts = [(1, MOST_CHARACTERS, "rank 1"), (2, MOST_CHARACTERS, "rank 2")]
    expected = [(True, False, True), 3, [Row("a", 7)], texts, [], [Row("é2", 2), Row("é1", 1)]]
    assert run_distributed_test(_agreements, 3) == [expected] * 3


def test_a_process_alone_agrees_with_itself() -> None:
    ranks, row = RankGroup(1.0), Row("a", 1)
    assert ranks.any(True, False) == (True, False) and ranks.sum(5) == 5 and ranks.tell(row, Row) == row
    assert ranks.texts("wrong") == [(0, "wrong")] and ranks.texts("") == [] and ranks.table(row, 0, 1, Row) == [row]


def _with_objects() -> tuple[Any, ...]:
    me = runtime.start(ParallelConfig(), seed=1, timeout_s=30)
    same: list[Any] = [None] * 2
    different: list[Any] = [None] * 2
    dist.all_gather_object(same, [(None, True), ((("wd_mult", 0.0),), False)])
    dist.all_gather_object(different, [("rank", me.rank), ()][: me.rank + 1])
    with pytest.raises(RuntimeError, match="gather_object unpickles what other ranks send"):
        dist.gather_object(Payload(Path("mark")))
    with pytest.raises(TypeError, match="Payload"):
        dist.all_gather_object(same, Payload(Path("mark")))
    return same, different


def test_a_library_that_sends_objects_gets_data_or_an_error() -> None:
    same = ((None, True), ((("wd_mult", 0.0),), False))
    expected = ([same, same], [(("rank", 0),), (("rank", 1), ())])
    assert run_distributed_test(_with_objects, 2) == [expected] * 2


OBJECTS = ("gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list")
"""Collectives of torch that unpickle what arrives; all_gather_object ends with the first."""
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = {"dump", "dumps", "UnpicklingError", "BUILD"}
EXCEPTIONS = {
    ("megatron_vcppo/mcore/object_collectives.py", "module.all_gather_object"): "replaces it",
    ("megatron_vcppo/hf/convert/checkpoint_metadata.py", "pickle._Unpickler"): "its subclass knows a few classes only",
    ("tools/gpu_check/child.py", "pickle.loads"): "between a process and its own child, through their private folder",
}
"""(file, call): why."""


def _risks(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            yield f"from {node.module}"
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr.endswith(OBJECTS) or (owner in PICKLES and node.attr not in HARMLESS):
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            reads = node.func.attr == "load" and ast.unparse(node.func) == "torch.load"
            unsafe = reads and options.get("weights_only") != "True"
            if unsafe or node.func.attr == "read_pickle" or options.get("allow_pickle", "False") != "False":
                yield ast.unparse(node.func)


def test_no_module_unpickles_what_others_wrote() -> None:
    sources = {
        str(path.relative_to(ROOT)): path.read_text() for path in [*modules("megatron_vcppo"), *modules("tools")]
    }
    assert {(name, risk) for name, source in sources.items() for risk in _risks(source)} == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "line",
    [
        "torch.distributed.all_gather_object(values, value)",
        "dist.broadcast_object_list(values)",
        "c10d._world.gather_object(value)",
        "pickle.loads(data)",
        "pickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_finds(line: str) -> None:
    assert list(_risks(line))
