"""Reading config.json: sizes against transformers' own models, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.mapping import hf_shapes, parameters
from megatron_vcppo.hf.rope import LinearScaling, RopeScaling, Yarn
from tools.benchmarks._tiny_models import FAMILIES, YARN, save_tiny_model

CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_sizes_and_names_are_those_of_transformers(tmp_path, family, tied):
    folder = save_tiny_model(tmp_path, family, tied)
    arch = Architecture.from_hf(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert arch.parameter_count() == sum(tensor.numel() for tensor in model.parameters())
    assert sorted(hf_shapes(parameters(arch)).items()) == sorted(shapes.items())
    assert arch.tied == tied
    assert arch.max_positions == model.config.max_position_embeddings
    assert arch.norm_eps == model.config.rms_norm_eps
    rope = model.config.rope_parameters
    assert arch.rope_theta == rope.get("full_attention", rope)["rope_theta"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_flops_are_those_that_torch_counts(tmp_path, family):
    """Of a mixture only of the experts that a token passes through, and of its router."""
    folder = save_tiny_model(tmp_path, family)
    arch = Architecture.from_hf(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    lengths = (24, 40)
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    # torch computes and counts the full attention square, of which causal attention needs half
    upper_half = arch.num_layers * 3 * 2 * arch.q_size * sum(length**2 for length in lengths)
    assert counter.get_total_flops() == arch.training_flops(lengths) + upper_half


def test_round_trip_through_json(tmp_path):
    for family in FAMILIES:
        sizes: dict[str, Any] = {"rope_parameters": YARN} if family == "qwen2" else {}
        arch = Architecture.from_hf(save_tiny_model(tmp_path / family, family, **sizes))
        again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
        assert again == arch
        assert again.config == arch.config


def test_both_spellings_of_rope_scaling_mean_the_same(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    base = json.loads((save_tiny_model(tmp_path, "llama") / "config.json").read_text())
    base.pop("rope_parameters")
    new = Architecture.from_config(base | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    old = Architecture.from_config(base | {"rope_scaling": scaling, "rope_theta": 5e5})
    assert new == old
    assert new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert new.rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral' is not supported; supported: qwen2, qwen3, qwen3_moe, llama, mistral"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, "yarn lacks original_max_pos"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "lacks low_freq_factor"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "type 'yarn', rope_parameters 'default'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"layer_types": None, "use_sliding_window": True, "max_window_layers": 2}, "sliding window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"torch_dtype": "float64", "dtype": None}, "dtype float64"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(tmp_path, change, message):
    config = json.loads((save_tiny_model(tmp_path, "qwen2") / "config.json").read_text())
    Architecture.from_config(config)
    with pytest.raises(UserError, match=message):
        Architecture.from_config(config | change)


def test_a_window_that_no_layer_uses_is_no_obstacle(tmp_path):
    config = json.loads((save_tiny_model(tmp_path) / "config.json").read_text())
    del config["layer_types"]
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": config["num_hidden_layers"]}
    Architecture.from_config(config | window)


def test_a_manifest_from_before_the_newer_switches_reads_as_the_same_model(tmp_path):
    arch = Architecture.from_hf(save_tiny_model(tmp_path, "llama"))
    stored = json.loads(json.dumps(arch.to_dict()))
    for name in ("wide_qk_norm", "norms", "window", "gelu", "query_scalar", "global_layers", "local_rope_theta"):
        del stored[name]
    assert Architecture.from_dict(stored) == arch
    with pytest.raises(UserError, match=r"norms, window, .* no such model"):
        Architecture.from_dict(stored | {"norms": "inside"})


def test_yarn_is_read_with_the_papers_defaults(tmp_path):
    config = json.loads((save_tiny_model(tmp_path, "qwen3") / "config.json").read_text())
    del config["rope_parameters"]
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    arch = Architecture.from_config(config | {"rope_scaling": yarn, "rope_theta": 1e6})
    assert isinstance(arch.rope_scaling, Yarn)
    assert replace(arch.rope_scaling, attention_factor=0.0) == Yarn(4.0, 256, 32.0, 1.0, 0.0, True)
    assert arch.rope_scaling.attention_factor == pytest.approx(1.1386294)
    with pytest.raises(UserError, match=r"the model's 256 positions \(max_position_embeddings .*; YaRN's .* is 1024\)"):
        arch.check_length(1024)
    for change, factor in (({"attention_factor": 1.5}, 1.5), ({"mscale": 2.0, "mscale_all_dim": 1.0}, 1.1217511)):
        changed = Architecture.from_config(config | {"rope_scaling": yarn | change, "rope_theta": 1e6})
        assert isinstance(changed.rope_scaling, Yarn)
        assert changed.rope_scaling.attention_factor == pytest.approx(factor)


def test_mistrals_window_is_the_one_of_transformers(tmp_path):
    config = json.loads((save_tiny_model(tmp_path, "mistral") / "config.json").read_text())
    assert Architecture.from_config(config).window == 9
    assert Architecture.from_config(config | {"sliding_window": None}).window is None
    del config["sliding_window"]
    assert Architecture.from_config(config).window == MistralConfig().sliding_window
    with pytest.raises(UserError, match="sliding_window 0 is not a positive integer"):
        Architecture.from_config(config | {"sliding_window": 0})


def test_gemmas_layers_and_both_rotary_bases_are_read_from_either_spelling(tmp_path):
    config = json.loads((save_tiny_model(tmp_path, "gemma3_text") / "config.json").read_text())
    new = Architecture.from_config(config)
    assert (new.global_layers, new.window, new.local_rope_theta) == ((1, 3), 9, 10000.0)
    assert (new.rope_theta, new.rope_scaling) == (50000.0, LinearScaling(2.0))
    for key in ("rope_parameters", "layer_types"):
        del config[key]
    config |= {"rope_theta": 50000.0, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
    assert Architecture.from_config(config | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}) == new
    del config["rope_local_base_freq"], config["rope_theta"], config["sliding_window_pattern"]
    bare, theirs = Architecture.from_config(config), Gemma3TextConfig(num_hidden_layers=4)
    assert Architecture.from_config(config | {"rope_local_base_freq": None, "sliding_window_pattern": None}) == bare
    assert bare.local_rope_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert bare.rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"] and bare.global_layers == ()
    for change, message in (
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"hidden_activation": "silu"}, r"hidden_activation 'silu' \(supported: gelu_pytorch_tanh"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "'linear' of sliding_attention"),
    ):
        with pytest.raises(UserError, match=message):
            Architecture.from_config(config | change)


def test_operations_of_attention_in_a_window_are_those_of_the_band(tmp_path):
    whole = Architecture.from_hf(save_tiny_model(tmp_path, "mistral", sliding_window=None))
    windowed = replace(whole, window=8)
    assert windowed.training_flops([8]) == whole.training_flops([8])
    # 2 products of 2 operations per query, key and channel; the triangle of 20 tokens against 8 per token
    fewer = 20 * 20 / 2 - (8 * 8 / 2 + 8 * 12)
    expected = 3 * 4 * whole.q_size * whole.num_layers * fewer
    assert whole.training_flops([20]) - windowed.training_flops([20]) == expected


def test_unreadable_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Architecture.from_hf(tmp_path)


def test_a_layout_that_does_not_fit_is_refused_with_the_numbers(tmp_path):
    arch = Architecture.from_hf(save_tiny_model(tmp_path))
    arch.check_parallel(2, 4)
    with pytest.raises(UserError, match=r"key-value heads 2 is not divisible by tp 4.*4 layers .* pp 5"):
        arch.check_parallel(4, 5)


def test_sequences_longer_than_the_models_positions_are_refused_with_the_numbers(tmp_path):
    arch = Architecture.from_hf(save_tiny_model(tmp_path))
    arch.check_length(256)
    with pytest.raises(UserError, match=r"model\.max_length 257 is more than the model's 256 positions"):
        arch.check_length(257)


def test_head_size_without_the_key_follows_transformers(tmp_path):
    config = json.loads((save_tiny_model(tmp_path, "qwen3") / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Architecture.from_hf(tmp_path).head_dim == AutoConfig.from_pretrained(tmp_path).head_dim


@pytest.fixture
def mixture(tmp_path):
    return json.loads((save_tiny_model(tmp_path, "qwen3_moe") / "config.json").read_text())


def test_which_layers_have_experts(mixture):
    assert Architecture.from_config(mixture).sparse_layers == (0, 1, 2, 3)
    arch = Architecture.from_config(mixture | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts": 8})
    assert arch.sparse_layers == (1,)
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    one_expert = 3 * 64 * 48
    assert arch.expert_parameter_count() == 8 * one_expert
    assert arch.parameter_count() - arch.active_parameter_count() == 6 * one_expert


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": None}, "missing or not a positive integer: num_experts_per_tok"),
        ({"num_local_experts": 0}, "not a positive integer: num_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of num_experts 8"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers '0' is not a list"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ({"shared_expert_intermediate_size": 64}, "shared experts"),
    ],
)
def test_mixtures_that_megatron_would_compute_differently_are_refused(mixture, change, message):
    with pytest.raises(UserError, match=message):
        Architecture.from_config(mixture | change)


def test_experts_are_divided_only_where_there_are_some(mixture, tmp_path):
    Architecture.from_config(mixture).check_parallel(2, 2, 4)
    with pytest.raises(UserError, match="experts 8 are not divisible by ep 3"):
        Architecture.from_config(mixture).check_parallel(1, 1, 3)
    with pytest.raises(UserError, match=r"no experts for parallel\.ep 2"):
        Architecture.from_hf(save_tiny_model(tmp_path / "dense")).check_parallel(1, 1, 2)


def test_manifests_of_before_describe_dense_models(tmp_path):
    arch = Architecture.from_hf(save_tiny_model(tmp_path))
    old = {name: value for name, value in arch.to_dict().items() if name != "experts"}
    assert Architecture.from_dict(old) == arch
    for damaged in ({}, {"count": 8}, [1]):
        with pytest.raises(UserError, match=r"architecture\.experts"):
            Architecture.from_dict({**old, "experts": damaged})
