"""Checkpoints as Megatron-LM saves them (its model and Megatron-Core's own save) as the start of actor and critic."""

import argparse
import os
import pickle
import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_vcppo.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf import mapping
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.folders import LATEST
from megatron_vcppo.launch.checks import check_inputs
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_base, load_hf
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.mcore.model import build_actor, build_critic, transformer_config
from megatron_vcppo.stages.initial_models import starting_actor, starting_critic
from megatron_vcppo.stages.provenance import identity
from tests.helpers.checkpoints import torchs_own
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences
from tools.benchmarks._tiny_models import save_tiny_model

PADDED = 192
"""Rows that their vocabulary is padded to; ours has 128."""


def save_as_megatron_lm(hf: Path, folder: Path, parallel: ParallelConfig, keys: str) -> None:
    """One rank: the weights of ``hf`` in a plain GPTModel, saved next to what Megatron-LM saves with them."""
    me = runtime.start(parallel, seed=1, timeout_s=60)
    mapping.padded_vocab_size = lambda vocab_size, tp: PADDED
    arch = Architecture.from_hf(hf)
    config = transformer_config(arch, ModelConfig(hf=str(hf), dtype="float32"), parallel)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    model: Any = GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=256,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
    )
    model.arch, model.kind = arch, "actor"
    load_hf(model, hf)
    metadata = {"non_homogeneous_layers": True} if keys == "per layer" else None
    weights = model.sharded_state_dict(metadata=metadata)
    moments = {
        name: replace(entry, key=f"optimizer.state.exp_avg.{entry.key}")
        for name, entry in weights.items()
        if isinstance(entry, ShardedTensor)
    }
    place = ((me.pp_size, me.tp_size), (me.pp_rank, me.tp_rank))
    state = {
        "args": argparse.Namespace(num_layers=arch.num_layers),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": weights,
        "optimizer": moments,
        "rng_state": ShardedObject("rng_state", [{"random": 1}], *place),
    }
    filesystem_async._results_queue = queue.Queue()  # not one of a process that imports torch first
    with torchs_own():
        dist_checkpointing.save(state, str(folder))


class Trap:
    """Runs a command when a pickle of it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """hf; and folders of Megatron-LM by how they name layers."""
    root = tmp_path_factory.mktemp("megatron_lm")
    found = {"hf": save_tiny_model(root / "hf", "qwen3")}
    for keys, parallel in (("stacked", ParallelConfig(tp=2, pp=2)), ("per layer", ParallelConfig())):
        folder = root / keys / "iter_0000010"
        folder.mkdir(parents=True)
        run_distributed_test(
            save_as_megatron_lm, parallel.tp * parallel.pp, found["hf"], folder, parallel, keys, timeout_s=120
        )
        (folder.parent / LATEST).write_text("10")
        (folder / "common.pt").write_bytes(pickle.dumps(Trap(root / "sprung")))
        found[keys] = folder.parent
    return found


def config_of(hf: Path, weights: Path | None) -> Config:
    config = Config()
    config.run.dir, config.model.hf, config.model.dtype, config.stages = str(hf.parent / "run"), str(hf), "float32", []
    config.model.weights = str(weights) if weights else None
    return config


@pytest.mark.parametrize("keys", ["stacked", "per layer"])
def test_actor_and_critic_start_from_it(saved: dict[str, Path], keys: str) -> None:
    """Under another layout: log-probs and the critic's trunk, bit for bit those of the Hugging Face folder."""
    hf, folder = saved["hf"], saved[keys]
    assert keys != "per layer" or b"decoder.layers.3.mlp" in (folder / "iter_0000010" / ".metadata").read_bytes()
    sequences = make_sequences(7)

    def body() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        found = []
        parallel = ParallelConfig(tp=2)
        runtime.start(parallel, seed=3, timeout_s=60)
        for weights, init, path in (
            (None, "random_head", None),
            (folder, "random_head", None),
            (None, "checkpoint", str(folder)),
        ):
            config = config_of(hf, weights)
            config.parallel = parallel
            critic = starting_critic(config, "ppo", init, path)
            actor = Actor(starting_actor(config, "ppo"), parallel, OptimizerConfig(), ScheduleConfig(), total_steps=1)
            microbatches = pack_all(sequences, 160, *rounding(parallel))
            trunk = [p.detach().clone() for name, p in critic.named_parameters() if "value_head" not in name]
            found.append((unpack_all(microbatches, actor.logprobs(microbatches)), trunk))
        return found

    for expected, *others in run_distributed_test(body, 2):
        for found in others:
            for ours, theirs in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not (hf.parent / "sprung").exists(), "a pickle was loaded"


def error_of_loading(hf: Path, folder: Path, kind: str = "actor") -> str:
    def body() -> str:
        runtime.start(ParallelConfig(), seed=3, timeout_s=60)
        build = build_critic if kind == "critic" else build_actor
        model = build(Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32"), ParallelConfig())
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(UserError) as failure:
            load_base(model, folder)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(failure.value)

    return run_distributed_test(body, 1)[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "llama"}, "unexpected decoder.layers.self_attention.k_layernorm.weight"),
        ({"family": "qwen3", "tied": True}, "is not the model of model.hf: unexpected output_layer.weight"),
        (
            {"family": "qwen3", "num_hidden_layers": 2},
            r"qkv.layer_norm_weight is \[4, 64\], should be \[2, 64\]",
        ),
        ({"family": "qwen3", "vocab_size": 200}, r"word_embeddings.weight is \[192, 64\], should be \[256, 64\]"),
        ({"family": "qwen3", "intermediate_size": 48}, r"mlp.linear_fc1.weight is \[4, 192, 64\], should be \[4, 96"),
        ({"family": "qwen2"}, "missing decoder.layers.0.self_attention.linear_qkv.bias; .* more$"),
    ],
)
def test_another_model_is_refused_in_one_line(
    saved: dict[str, Path], tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    error = error_of_loading(save_tiny_model(tmp_path, **model), saved["stacked"])
    assert error.startswith(f"{saved['stacked'] / 'iter_0000010'}: is not the model of model.hf: ")
    with pytest.raises(UserError, match=message):
        raise UserError(error)
    assert "\n" not in error


def test_folders_that_are_none_are_named_before_anything_starts(saved: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(saved["hf"], tmp_path)
    with pytest.raises(UserError, match=r"model\.weights: .*no checkpoint of Megatron-LM.*no \.metadata"):
        check_inputs(config, [])
    for content, message in (("11", r"iter_0000011: no checkpoint"), ("../x", "names '../x', which is no iteration")):
        (tmp_path / LATEST).write_text(content)
        with pytest.raises(UserError, match=message):
            check_inputs(config, [])
    config.model.weights = str(saved["stacked"])
    check_inputs(config, [])


def test_stored_rollouts_know_which_weights_made_them(saved: dict[str, Path]) -> None:
    first, second = identity(saved["stacked"]), identity(saved["per layer"])
    assert first == identity(saved["stacked"]) and len({first, second, identity(saved["hf"])}) == 3
