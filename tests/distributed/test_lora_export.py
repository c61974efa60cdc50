"""Adapters leave merged, for transformers, and alone, for PEFT; both compute what Megatron did."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_vcppo.config import Config, Dtype, ParallelConfig
from megatron_vcppo.data.packing import pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.adapter_weights import export_peft
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.mcore.starting_weights import load_component
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.stages import export
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.lora import LORA, fill, start_with_adapters
from tests.helpers.training import make_sequences, step, train
from tools.benchmarks._tiny_models import save_tiny_model


def save(hf: Path, folder: Path, parallel: ParallelConfig, dtype: Dtype = "float32", base: Path | None = None) -> dict:
    """A checkpoint after a step of actor and critic; log-probs and values of sequences under it.

    base: a component with all weights below the adapters, in place of hf.
    """
    actor, critic = start_with_adapters(hf, parallel, dtype=dtype)
    if base is not None:
        load_component(actor.model, base, hf)
        load_component(critic.model, base, hf, without_head=True)
    fill(actor.model)
    fill(critic.model, seed=12)
    step(actor, parallel, 0)
    step(critic, parallel, 0)
    checkpoint_folder(folder, hf).save(1, {"actor": actor, "critic": critic}, {})
    microbatches = pack_all(make_sequences(7, 3), 160, *rounding(parallel))
    return {
        "logprobs": unpack_all(microbatches, actor.logprobs(microbatches)),
        "values": unpack_all(microbatches, critic.values(microbatches)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("lora")
    hf, checkpoints = save_tiny_model(folder / "hf"), folder / "run" / "ppo" / "checkpoints"
    parallel = ParallelConfig(tp=2, distributed_optimizer=True)
    return hf, checkpoints / "iter_0000001", run_distributed_test(save, 2, hf, checkpoints, parallel)[0]


def difference(model: torch.nn.Module, rows: list[torch.Tensor]) -> float:
    worst = 0.0
    for row, sequence in zip(rows, make_sequences(7, 3), strict=True):
        ids = torch.tensor([sequence.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        worst = max(worst, float((row[1:] - logprobs).abs().max()))
    return worst


def test_merged_weights_compute_the_same(saved: tuple[Path, Path, dict], tmp_path: Path) -> None:
    hf, iteration, computed = saved
    line = export_hf(iteration, tmp_path / "out")
    assert "agree with Megatron's" in line
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(model, computed["logprobs"]) <= 1e-4
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert difference(base, computed["logprobs"]) > 0.01


def test_peft_reads_the_adapters(saved: tuple[Path, Path, dict], tmp_path: Path) -> None:
    hf, iteration, computed = saved
    assert export_peft(iteration / "actor", tmp_path / "peft", None) == f"28 adapters for the model in {hf}"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32)
    assert difference(model, computed["logprobs"]) <= 1e-4
    assert {p.stem for p in (tmp_path / "peft").iterdir()} == {"adapter_config", "adapter_model"}


def test_a_critics_adapters_are_merged_with_its_head(saved: tuple[Path, Path, dict], tmp_path: Path) -> None:
    _, iteration, computed = saved
    export_hf(iteration / "critic", tmp_path / "critic", verify_logits=False)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", dtype=torch.float32).eval()
    for row, sequence in zip(computed["values"], make_sequences(7, 3), strict=True):
        with torch.no_grad():
            values = model(torch.tensor([sequence.token_ids])).logits[0, :, 0]
        assert (row[1:] - values[:-1]).abs().max() <= 1e-4, "the value of the state before each token"
    with pytest.raises(UserError, match="has no adapters of an actor"):
        export_peft(iteration / "critic", tmp_path / "peft", None)


def test_all_weights_of_a_stage_are_merged_with(tmp_path: Path) -> None:
    """The base is a training checkpoint; everything is bfloat16, to which the sum is rounded once."""
    hf, layout = save_tiny_model(tmp_path / "hf", tied=True), ParallelConfig()
    run_distributed_test(train, 1, hf, tmp_path / "sft", layout, range(1), save_at=1, dtype="bfloat16")
    full, folder = tmp_path / "sft" / "iter_0000001" / "actor", tmp_path / "ppo"
    computed = run_distributed_test(save, 1, hf, folder, layout, "bfloat16", full)[0]
    export_hf(folder / "iter_0000001", tmp_path / "out", verify_logits=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert difference(model, computed["logprobs"]) <= 0.1
    line = export_peft(folder / "iter_0000001" / "actor", tmp_path / "peft", hf)
    assert line.endswith(f"adapters for the weights of {full}, which vcppo convert export gives to transformers")


def test_the_stage_exports_both(saved: tuple[Path, Path, dict], tmp_path: Path) -> None:
    hf, iteration, computed = saved
    config = Config()
    config.run.dir, config.model.hf, config.stages = str(iteration.parents[2]), str(hf), ["ppo", "export"]
    config.model.lora = LORA
    config.export.verify_logits, config.export.peft = False, True
    StageFolder(iteration.parents[1]).mark_done(checkpoint=iteration)
    export.run(config)
    folder = iteration.parents[2] / "export"
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "manifest.json", "peft"]
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    for model in (
        AutoModelForCausalLM.from_pretrained(folder / "hf"),
        peft.PeftModel.from_pretrained(base, folder / "peft"),
    ):
        assert difference(model, computed["logprobs"]) <= 1e-4
