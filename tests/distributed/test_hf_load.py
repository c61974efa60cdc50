"""A Hugging Face folder into live models: every form of it gives the same weights, and a bad one is listed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.model import build_actor, build_critic
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._tiny_models import save_tiny_model

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_all(folders: list[Path], kind: str = "actor") -> list[dict[str, torch.Tensor] | str]:
    """The weights that a model of one rank has after loading each folder, or the error."""

    def body() -> list[dict[str, torch.Tensor] | str]:
        runtime.start(ParallelConfig(), seed=1, timeout_s=60)
        results: list[dict[str, torch.Tensor] | str] = []
        for folder in folders:
            build = build_critic if kind == "critic" else build_actor
            model = build(Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32"), ParallelConfig())
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            try:
                load_hf(model, folder)
            except UserError as error:
                assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
                results.append(str(error))
            else:
                results.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return results

    return run_distributed_test(body, 1)[0]


def test_sharded_and_redundant_folders_load_the_same(tmp_path: Path) -> None:
    folders = [save_tiny_model(tmp_path / "whole", "qwen3", tied=True)]
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    folders += [tmp_path / "sharded", save_tiny_model(tmp_path / "copy", "qwen3", tied=True)]
    rewrite(folders[2], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(folders[2], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    loaded = load_all(folders)
    for other in loaded:
        assert isinstance(other, dict) and isinstance(loaded[0], dict) and other.keys() == loaded[0].keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in loaded[0].items())


def test_what_does_not_fit_the_config_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    def missing(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.2.mlp.gate_proj.weight"]

    def misshaped(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(66, 63)

    def unexpected(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)

    cases: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
        (missing, r"missing: model\.layers\.2\.mlp\.gate_proj\.weight \[96, 64\]\n  missing: model\.norm\.weight \[64"),
        (misshaped, r"misshaped: lm_head\.weight is \[66, 63\], should be \[66, 64\]"),
        (unexpected, r"unexpected: model\.layers\.0\.self_attn\.o_proj\.bias"),
    ]
    folders = []
    for number, (spoil, _) in enumerate(cases):
        folders.append(save_tiny_model(tmp_path / str(number), "llama"))
        rewrite(folders[-1], spoil)
    folders.append(save_tiny_model(tmp_path / "cut", "llama"))
    with open(folders[-1] / WEIGHTS, "r+b") as stream:
        stream.truncate(100_000)
    folders.append(save_tiny_model(tmp_path / "tied", "llama", tied=True))
    rewrite(folders[-1], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    messages = [message for _, message in cases] + [r"truncated or damaged: 100000 bytes", "ties the output layer"]
    for error, message in zip(load_all(folders), messages, strict=True):
        assert isinstance(error, str) and re.search(message, error), error


@pytest.mark.parametrize("head", [None, "score.weight"])
def test_a_critic_needs_the_trunk_alone(tmp_path: Path, head: str | None) -> None:
    folder = save_tiny_model(tmp_path / "hf", "qwen2")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        if head:
            tensors[head] = torch.ones(1, 64)

    whole = load_all([folder], "critic")[0]
    rewrite(folder, change)
    trunk = load_all([folder], "critic")[0]
    assert isinstance(whole, dict) and isinstance(trunk, dict)
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in whole.items())
    assert isinstance(load_all([folder])[0], str)
