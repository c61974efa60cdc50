"""The mapping's pure functions: every one has an inverse, and blocks follow Megatron's order."""

import pytest
import torch

from megatron_vcppo.hf.architecture import FAMILIES, Architecture
from megatron_vcppo.hf.mapping import (
    Place,
    canonical_name,
    checkpoint_place,
    hf_shapes,
    merge,
    padded_vocab_size,
    parameters,
    pipeline_stage,
    shard,
    split,
    unshard,
)

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def architecture(family: str, tied: bool = False, vocab_size: int = 250, **more) -> Architecture:
    return Architecture.from_config(
        {
            "model_type": family,
            "hidden_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "intermediate_size": 20,
            "vocab_size": vocab_size,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            **(MIXTURE if family == "qwen3_moe" else {}),
            **more,
        }
    )


def counted(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors in which every element of the whole model has its own value."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size).view(shape)
        start += size
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_merge_split_shard_and_unshard_are_inverses(family, tp):
    table = parameters(architecture(family), tp)
    tensors = counted(hf_shapes(table))
    again: dict[str, torch.Tensor] = {}
    for parameter in table:
        full = merge(parameter, tensors)
        assert tuple(full.shape) == parameter.shape
        shards = [shard(parameter, full, rank, tp) for rank in range(tp)]
        assert all(part.is_contiguous() for part in shards)
        assert torch.equal(unshard(parameter, shards), full)
        again |= split(parameter, full)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_query_key_value_are_interleaved_per_group():
    arch = architecture("qwen2")
    table = {parameter.name: parameter for parameter in parameters(arch)}
    tensors = counted(hf_shapes(table.values()))
    for kind in ("weight", "bias"):
        full = merge(table[f"decoder.layers.1.self_attention.linear_qkv.{kind}"], tensors)
        q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv")
        for group in range(4):
            rows = full[group * 24 : (group + 1) * 24]
            assert torch.equal(rows[:12], q[group * 12 : (group + 1) * 12])
            assert torch.equal(rows[12:18], k[group * 6 : (group + 1) * 6])
            assert torch.equal(rows[18:], v[group * 6 : (group + 1) * 6])


def test_gate_and_up_are_split_each_for_itself():
    parameter = next(p for p in parameters(architecture("llama")) if p.name.endswith("linear_fc1.weight"))
    tensors = counted(hf_shapes([parameter]))
    gate, up = (tensors[name] for name in parameter.hf_names)
    second = shard(parameter, merge(parameter, tensors), 1, 2)
    assert torch.equal(second, torch.cat([gate[10:], up[10:]]))


def test_padding_is_zero_and_is_dropped():
    table = parameters(architecture("qwen3", vocab_size=130), tp=2)
    embedding = table[0]
    tensors = counted(hf_shapes(table))
    full = merge(embedding, tensors)
    assert full.shape == (256, 24)
    assert not full[130:].any()
    assert split(embedding, full)["model.embed_tokens.weight"].shape == (130, 24)


def test_padded_vocabulary_does_not_depend_on_usual_tp():
    assert {padded_vocab_size(151_936, tp) for tp in (1, 2, 4, 8, 16)} == {151_936}
    assert {padded_vocab_size(250, tp) for tp in (1, 2, 4, 8, 16)} == {256}
    assert padded_vocab_size(250, 3) == 384


def test_tied_models_have_no_output_layer():
    assert [p.name for p in parameters(architecture("llama", tied=True))][-1] == "decoder.final_layernorm.weight"
    assert parameters(architecture("llama"))[-1].hf_names == ("lm_head.weight",)


def test_local_names_of_any_stage_become_canonical():
    assert canonical_name("decoder.layers.1.input_layernorm.weight", 2) == (
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    )
    assert canonical_name("decoder.layers.0.pre_mlp_layernorm.weight") == (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    )
    unchanged = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name(unchanged) == unchanged
    assert canonical_name("embedding.word_embeddings.weight", 2) == "embedding.word_embeddings.weight"


def test_layers_are_stacked_and_belong_to_their_stage():
    name = "decoder.layers.3.mlp.linear_fc2.weight"
    assert checkpoint_place(name, architecture("llama")) == Place("decoder.layers.mlp.linear_fc2.weight", (4,), (3,))
    assert [pipeline_stage(name, layers) for layers in ((4,), (2, 2), (1, 1, 1, 1), (3, 1))] == [0, 1, 3, 1]
    assert pipeline_stage("embedding.word_embeddings.weight", (2, 2)) == 0
    assert pipeline_stage("output_layer.weight", (2, 2)) == 1


def test_experts_are_stacked_and_named_by_their_place_among_all():
    names = ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1")
    found = {canonical_name(f"decoder.layers.0.{name}", 2, 2, sparse=(2,)) for name in names}
    name = "decoder.layers.2.mlp.experts.experts.3.linear_fc2.weight"
    assert found == {name}
    parameter = next(p for p in parameters(architecture("qwen3_moe")) if p.name == name)
    assert (parameter.expert, parameter.hf_names) == (3, ("model.layers.2.mlp.experts.3.down_proj.weight",))
    key = "mlp.experts.experts.linear_fc2.weight"
    assert checkpoint_place(name, architecture("qwen3_moe")) == Place(f"decoder.layers.{key}", (4, 4), (2, 3))
    mixed = architecture("qwen3_moe", mlp_only_layers=[0])
    assert checkpoint_place(name, mixed) == Place(f"decoder.layers.2.{key}", (4,), (3,))
    norm = "decoder.layers.{}.pre_mlp_layernorm.weight"
    assert canonical_name(norm.format(0), 2, sparse=(2,)) == norm.format(2)
