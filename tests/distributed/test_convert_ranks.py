"""Conversion against real Megatron ranks: what they load from an import, and an export of what they save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.exporter import TOLERANCE, compare_logits, export_hf
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.mcore import export_logits, runtime
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.run.folder import StageFolder
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._tiny_models import FAMILIES, save_tiny_model

CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]
TOKEN_IDS = [3, 1, 65, 20, 7, 7, 0, 41]


def load_and_save(checkpoint: Path, run: Path, parallel: ParallelConfig) -> None:
    """Load an import into a trainer's model and save a training checkpoint, optimizer and all."""
    runtime.start(parallel, seed=1, timeout_s=60)
    hf = checkpoint / "hf"
    model = build_actor(Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32"), parallel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever is not loaded shows
    load_model(model, checkpoint)
    actor = Actor(model, parallel, OptimizerConfig(), ScheduleConfig(), total_steps=1)
    checkpoint_folder(run, hf).save(7, {"actor": actor}, {})
    runtime.stop()


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_imported_loaded_by_ranks_saved_and_exported_is_bit_equal(tmp_path, family, tied):
    hf = save_tiny_model(tmp_path / "hf", family, tied)
    import_hf(hf, tmp_path / "imported", 2, 2)
    experts: dict[str, Any] = {"ep": 2, "sequence_parallel": True} if family == "qwen3_moe" else {}
    parallel = ParallelConfig(tp=2, pp=2, **experts)
    run_distributed_test(load_and_save, 4, tmp_path / "imported", tmp_path / "run", parallel)
    export_hf(tmp_path / "run" / "iter_0000007", tmp_path / "out", verify_logits=False)
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_an_import_for_one_layout_loads_in_another(tmp_path):
    hf = save_tiny_model(tmp_path / "hf", "qwen3")
    import_hf(hf, tmp_path / "imported", 1, 4)
    import_hf(hf, tmp_path / "uneven", 1, 3)
    sizes = [(tmp_path / "uneven" / f"__{rank}_0.distcp").stat().st_size for rank in range(3)]
    assert sizes[0] < sizes[1] > sizes[2], "1, 2 and 1 layers"
    stage = tmp_path / "sft"
    run_distributed_test(load_and_save, 3, tmp_path / "imported", stage / "checkpoints", ParallelConfig(pp=3))
    StageFolder(stage).mark_done(checkpoint=stage / "checkpoints" / "iter_0000007")
    export_hf(stage, tmp_path / "out", verify_logits=False)  # of a done stage its last checkpoint is meant
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def megatron_logits(checkpoint: Path, exported: Path, dtype: torch.dtype | None) -> torch.Tensor:
    runtime.start(ParallelConfig(), seed=1, timeout_s=60)
    result = export_logits.megatron_logits(checkpoint, Architecture.from_hf(exported), "actor", TOKEN_IDS, dtype)
    runtime.stop()
    return result


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_logits_agree_with_transformers(tmp_path, family, tied, dtype):
    import_hf(save_tiny_model(tmp_path / "hf", family, tied), tmp_path / "imported", 2, 2)
    export_hf(tmp_path / "imported", tmp_path / "out", dtype, verify_logits=False)
    ours = run_distributed_test(megatron_logits, 1, tmp_path / "imported", tmp_path / "out", dtype)[0]
    theirs = export_logits.hf_logits(tmp_path / "out", "actor", TOKEN_IDS)
    assert ours.shape == theirs.shape == (len(TOKEN_IDS), 66)
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.slow  # two processes that import megatron and transformers afresh
def test_the_logits_check_passes_a_good_export_and_stops_a_wrong_one(tmp_path):
    hf = save_tiny_model(tmp_path / "hf", "llama")
    import_hf(hf, tmp_path / "imported", 2, 1)
    result = export_hf(tmp_path / "imported", tmp_path / "out")
    assert result.startswith("logits of 16 tokens agree")
    # Another rope base changes no tensor: only the logits tell.
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace("10000.0", "500.0"))
    with pytest.raises(UserError, match="logits differ from Megatron's by"):
        compare_logits(tmp_path / "imported", tmp_path / "out", Architecture.from_hf(hf))


def test_too_little_memory_skips_the_logits_and_says_so(tmp_path, monkeypatch):
    arch = Architecture.from_hf(save_tiny_model(tmp_path))
    monkeypatch.setattr("megatron_vcppo.hf.convert.exporter._BASE_BYTES", 1 << 60)
    assert compare_logits(tmp_path, tmp_path, arch).startswith("logits not compared: that takes about")
