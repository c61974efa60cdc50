"""Transformer Engine's own Python (over tests/helpers/te) against our layers and torch's AdamW, on CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vcppo.config.schema import ParallelConfig
from megatron_vcppo.mcore.convert.exporter import export_hf
from tests.helpers.distributed import run_distributed_test
from tests.helpers.te.process import Call
from tests.helpers.te.scenarios import Case, outputs_and_gradients, train
from tests.helpers.tiny_models import save_tiny_model

TE = {"layers": "transformer_engine"}
SIDES = {"torch": {"layers": "torch"}, "te": TE}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        worst = float((ours[name] - theirs[name]).abs().max())
        assert worst <= limit, f"{name} differs by {worst:.1e}"


@pytest.mark.parametrize("kind", ["actor", "critic"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_outputs_and_gradients_equal_own_layers(
    te_ranks: Call, tmp_path: Path, family: str, tied: bool, kind: Any
) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", family, tied, num_hidden_layers=2), SIDES["torch"], kind=kind)
    ours = run_distributed_test(outputs_and_gradients, 1, case)[0]
    theirs = te_ranks(outputs_and_gradients, 1, replace(case, model=TE))[0]
    assert len(ours) > 20
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_gradients_are_equal(te_ranks: Call, tmp_path: Path, recompute: Any) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2), TE)
    kept = te_ranks(outputs_and_gradients, 1, case)[0]
    again = te_ranks(outputs_and_gradients, 1, replace(case, parallel=ParallelConfig(recompute=recompute)))[0]
    assert_close(kept, again, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize(("before", "after"), [("te", "te"), ("torch", "te"), ("te", "torch")])
def test_training_continues_across_layers_and_optimizers(
    te_ranks: Call, tmp_path: Path, before: str, after: str, distributed: bool, dtype: str
) -> None:
    """Saved with one optimizer, resumed with the other: the state is equal, and so is what comes of it."""
    run = {"torch": run_distributed_test, "te": te_ranks}
    hf = save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2)
    parallel = ParallelConfig(distributed_optimizer=distributed)
    # A critic has a float32 head, also in bfloat16.
    first, second = (Case(hf, {**SIDES[side], "dtype": dtype}, parallel, "critic") for side in (before, after))
    through = run[before](train, 1, first, tmp_path / "ck", range(4), save_at=2)[0]
    resumed = run[after](train, 1, second, tmp_path / "ck", range(2, 4))[0]
    assert "transformer_engine" in run["te"](train, 1, second, tmp_path / "none", range(0))[0]["optimizer"]
    assert through["saved"]["steps"] == resumed["loaded"]["steps"] == 2
    assert_close(through["saved"], resumed["loaded"], 0.0)
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed["history"], through["history"][2:], strict=True):
        limit = 1e-6 if dtype == "float32" else 2e-2  # other kernels round bfloat16 in other places
        assert loss == pytest.approx(expected_loss, rel=limit) and norm == pytest.approx(expected_norm, rel=10 * limit)
    if before == after:
        assert resumed["history"] == through["history"][2:], "the same optimizer must continue bit-equal"
