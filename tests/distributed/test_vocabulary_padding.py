"""Rows that pad the vocabulary for tensor parallelism: of other numbers under other layouts, and without any effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.mcore.model import build_actor
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences, train
from tools.benchmarks._tiny_models import VOCAB_SIZE, save_tiny_model

SIZES: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2}
"""Can be split over 3 ranks, for which 66 tokens are padded to 384 rows; over one to 128."""
TP3 = ParallelConfig(tp=3, dp=1, sequence_parallel=True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_continues_where_the_padding_is_another(tmp_path: Path, tied: bool) -> None:
    """One rank, three, one: weights and optimizer state, against a run that stays on one."""
    hf = save_tiny_model(tmp_path / "hf", tied=tied, **SIZES)
    expected = run_distributed_test(train, 1, hf, tmp_path / "none", ParallelConfig(), range(6))[0]
    found = run_distributed_test(train, 1, hf, tmp_path / "ck", ParallelConfig(), range(2), save_at=2)[0]
    found += run_distributed_test(train, 3, hf, tmp_path / "ck", TP3, range(2, 4), save_at=4)[0]
    found += run_distributed_test(train, 1, hf, tmp_path / "ck", ParallelConfig(), range(4, 6))[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    export_hf(tmp_path / "ck" / "iter_0000004", tmp_path / "out", verify_logits=False)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 96)


def test_imports_load_under_other_padding_and_padding_has_no_probability(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf", **SIZES)
    for tp in (1, 3):
        import_hf(hf, tmp_path / str(tp), tp, 1)
    sequences = make_sequences(0)

    def body(imported: str | None, parallel: ParallelConfig, padding: float) -> torch.Tensor:
        runtime.start(parallel, seed=1, timeout_s=60)
        model = build_actor(Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32"), parallel)
        load_hf(model, hf) if imported is None else load_model(model, tmp_path / imported)
        for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
            first = runtime.current().tp_rank * len(weight)
            weight.data[max(0, VOCAB_SIZE - first) :] += padding
        actor = Actor(model, parallel, OptimizerConfig(), ScheduleConfig(), total_steps=1)
        microbatches = pack_all(sequences, 160, *rounding(parallel))
        return torch.cat(unpack_all(microbatches, actor.logprobs(microbatches)))

    plain = run_distributed_test(body, 1, None, ParallelConfig(), 0.0)[0]
    for imported, parallel, limit in (("3", ParallelConfig(), 1e-6), ("1", TP3, 1e-5), ("3", TP3, 1e-5)):
        for padding in (0.0, 50.0):
            for found in run_distributed_test(body, parallel.tp, imported, parallel, padding):
                assert (found - plain).abs().max() <= limit


def test_a_checkpoint_of_fewer_tokens_is_refused(tmp_path: Path) -> None:
    import_hf(save_tiny_model(tmp_path / "small"), tmp_path / "imported", 1, 1)
    hf = save_tiny_model(tmp_path / "hf", vocab_size=200)

    def body() -> str:
        runtime.start(ParallelConfig(), seed=1, timeout_s=60)
        model = build_actor(Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32"), ParallelConfig())
        with pytest.raises(UserError) as failure:
            load_model(model, tmp_path / "imported")
        return str(failure.value)

    message = run_distributed_test(body, 1)[0]
    assert message.endswith("embedding.word_embeddings.weight has 128 rows, the model has 200 tokens")
