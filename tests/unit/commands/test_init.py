"""vcppo init: what it writes loads, says what its keys mean, and fits the cluster."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.chain_plan import plan_chain

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BIG = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}


def model(folder: Path, **sizes: int) -> str:
    """A model folder as far as it is read."""
    known = SIZES | {"intermediate_size": 4 * sizes.get("hidden_size", 64), "vocab_size": 256} | sizes
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 2048} | known))
    return str(folder)


def data(folder: Path, **sample: str) -> str:
    (folder / "data.jsonl").write_text(json.dumps(sample) + "\n")
    return str(folder / "data.jsonl")


def made(folder: Path, *options: str) -> Config:
    """The configuration that init writes."""
    assert main(["init", str(folder / "my.yaml"), *options]) == 0
    return load_config(folder / "my.yaml")


def test_data_with_responses_gives_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data(tmp_path, question="1+1?", response="2")
    config = made(tmp_path, "--model", model(tmp_path), "--data", source)
    assert (config.stages, config.sft.train, config.sft.prompt_key) == (["sft", "export"], source, "question")
    assert config.model.max_length == 2048 and config.run.dir == "runs/my"
    text = (tmp_path / "my.yaml").read_text()
    assert "# Sequences per optimizer step, over all ranks.\n  batch_size: 32" in text
    assert f"start it with: vcppo run {tmp_path / 'my.yaml'}" in capsys.readouterr().out


def test_problems_with_answers_give_vcppo_on_the_profiles_gpus(tmp_path: Path) -> None:
    source = data(tmp_path, prompt="1+1?", answer="2")
    options = ["--model", model(tmp_path), "--data", source, "--test", source]
    config = made(tmp_path, *options, "--cluster", "example-h100")
    assert config.stages == ["value_pretrain", "ppo", "export", "evaluate"]
    assert (config.cluster.name, config.prompts.task, config.parallel.tp) == ("example-h100", "math", 1)
    assert (config.rollout.engine.tp, config.rollout.engine.per_node) == (1, 8)


def test_a_larger_model_gets_a_layout_that_fits_and_one_that_cannot_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", model(tmp_path, **BIG), "--data", data(tmp_path, prompt="1+1?", answer="2", task="math")]
    profile = CONFIGS / "cluster" / "example-h100.yaml"
    config = made(tmp_path, *options, "--cluster", str(profile))
    assert config.parallel.tp > 1 and config.parallel.sequence_parallel and config.prompts.task is None
    (tmp_path / "my.yaml").unlink()
    small = tmp_path / "small.yaml"
    small.write_text("cluster: {name: small, gpus_per_node: 8, gpu_memory_gib: 4, rollout_nodes: 1}\n")
    assert main(["init", str(tmp_path / "my.yaml"), *options, "--cluster", str(small)]) == 2
    assert "fit no layout with tensor parallelism on 1 × 8 GPUs" in capsys.readouterr().err
    assert not list(tmp_path.glob("*my.yaml*"))


def test_a_mixture_gets_as_many_expert_parallel_ranks_as_it_needs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8}
    known = sizes | {"intermediate_size": 6144, "moe_intermediate_size": 768, "torch_dtype": "bfloat16"}
    known |= {"model_type": "qwen3_moe", "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(known))
    source = data(tmp_path, prompt="1+1?", answer="2", task="math")
    config = made(tmp_path, "--model", str(tmp_path), "--data", source, "--cluster", "example-h100")
    assert config.parallel.ep > 1
    assert all(stage.fits for stage in plan_chain(Architecture.from_hf(tmp_path), config, list(config.stages)))


@pytest.mark.parametrize(
    ("sample", "name", "message"),
    [
        ({"text": "x"}, "my.yaml", "the first sample has text: expected a prompt"),
        ({"prompt": "x", "response": "y"}, "data.jsonl", "exists already: choose another name"),
        ({"prompt": "x", "response": "y"}, "none/my.yaml", "no such folder for my.yaml"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], sample: dict, name: str, message: str) -> None:
    source = data(tmp_path, **sample)
    assert main(["init", str(tmp_path / name), "--model", model(tmp_path), "--data", source]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["with space: ${b}.yaml", "a\nb.yaml", "50%j.yaml"])
def test_any_name_of_the_file_gives_a_run_of_a_plain_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data(tmp_path, prompt="1+1?", response="2")
    assert main(["init", str(tmp_path / name), "--model", model(tmp_path), "--data", source]) == 0
    assert re.fullmatch(r"runs/[\w.-]+", load_config(tmp_path / name).run.dir)
    assert f"start it with: vcppo run {shlex.quote(str(tmp_path / name))}" in capsys.readouterr().out


def test_what_is_wrong_is_named_with_the_file_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a${b}"
    folder.mkdir()
    source = data(tmp_path, prompt="1+1?", response="2")
    assert main(["init", str(tmp_path / "my.yaml"), "--model", model(folder), "--data", source]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vcppo: error: {tmp_path}/my.yaml: ") and not (tmp_path / "my.yaml").exists()
