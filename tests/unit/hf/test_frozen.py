"""Patterns of frozen parameters: what they take, and which are refused."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_counts, frozen_names
from tools.benchmarks._tiny_models import save_tiny_model

KEY = "ppo.critic.frozen"


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return Architecture.from_hf(save_tiny_model(tmp_path_factory.mktemp("hf"), num_hidden_layers=2))


def test_attention_is_what_its_names_say(arch: Architecture) -> None:
    names = frozen_names(arch, ["*.self_attn.*"], KEY)
    inner = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight")  # Qwen2: no norms of queries and keys
    assert names == {f"decoder.layers.{layer}.self_attention.{name}" for layer in range(2) for name in inner}
    qkv = (arch.q_size + 2 * arch.kv_size) * (arch.hidden_size + 1)
    assert frozen_counts(arch, ["*.self_attn.*"], KEY) == (2 * (qkv + arch.hidden_size * arch.q_size), 0, 0)


def test_the_embedding_is_counted_apart_and_the_head_is_always_trained(arch: Architecture) -> None:
    assert frozen_counts(arch, ["model.embed_tokens.weight"], KEY) == (0, 0, arch.vocab_size * arch.hidden_size)
    assert not any(name.startswith("value_head") for name in frozen_names(arch, ["*"], KEY))
    assert frozen_names(arch, [], KEY) == frozenset() and frozen_counts(arch, [], KEY) == (0, 0, 0)


@pytest.mark.parametrize(
    ("patterns", "pp", "message"),
    [
        (["*.attention.*"], 1, r"no parameter matches '\*\.attention\.\*': patterns are over Hugging Face names"),
        (["score.*"], 1, "no parameter matches"),
        (["*.self_attn.*", "*.k_prok.*"], 1, "no parameter matches '.*k_prok"),
        (
            ["*.q_proj.weight"],
            1,
            r"q_proj.weight is frozen and model.layers.0.self_attn.k_proj.weight is not, but they",
        ),
        (["model.layers.0.*"], 1, r"model\.layers\.1\..* is frozen in some layers only: freeze it in all of them"),
        (["model.layers.*"], 2, "nothing is left to train in the layers, which parallel.pp 2 needs"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(
    arch: Architecture, patterns: list[str], pp: int, message: str
) -> None:
    with pytest.raises(UserError, match=f"^{KEY}: .*{message}"):
        frozen_names(arch, patterns, KEY, pp)


def test_experts_are_counted_apart(tmp_path: Path) -> None:
    arch = Architecture.from_hf(save_tiny_model(tmp_path / "hf", "qwen3_moe"))
    layers, experts, embedding = frozen_counts(arch, ["*.mlp.experts.*"], KEY)
    assert (layers, embedding) == (0, 0) and experts == arch.expert_parameter_count()
