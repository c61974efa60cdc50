"""The recipes for real models with every example profile, as `vcppo submit --dry-run` sees them."""

import json
import re
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config.value_sources import CONFIGS

PROFILES = sorted(path.stem for path in (CONFIGS / "cluster").glob("example-*.yaml"))
QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False}
MODELS = {
    "7b": QWEN
    | {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "32b": QWEN
    | {"hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 27648}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
}
"""config.json of Qwen2.5-7B and Qwen2.5-32B, as far as it counts."""
NEEDS = {
    ("32b", "example-split"): ["parallel.tp=4", "parallel.pp=4"],
    ("32b", "example-one-node"): ["cluster.trainer_nodes=4"],
}
"""Overrides without which a model does not fit a profile; the profiles name them."""


METHODS = {
    "vapo": ["sft", "reward_model", "value_pretrain", "ppo", "export", "evaluate"],
    "dapo": ["ppo", "export", "evaluate"],
    "grpo": ["sft", "ppo", "export", "evaluate"],
    "sao": ["sft", "value_pretrain", "ppo", "export", "evaluate"],
    "tppo": ["sft", "reward_model", "value_pretrain", "ppo", "export", "evaluate"],
}
"""Recipes next to VC-PPO's, with the stages of their chains."""


def arguments_for(folder: Path, size: str, method: str = "vcppo") -> list[str]:
    """A recipe, and what a user adds to it."""
    model, data = folder / "model", folder / "data.jsonl"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[size.removesuffix("_lora")]))
    data.touch()
    keys = {"run.dir": folder / "run", "model.hf": model, "sft.train": data}
    keys |= {"prompts.train": data, "prompts.test": data}
    given = [f"{key}={value}" for key, value in keys.items()]
    return [str(CONFIGS / "recipes" / f"{method}_{size}.yaml"), *given]


def dry_run(folder: Path, size: str, profile: str, *overrides: str, method: str = "vcppo") -> int:
    return main(["submit", *arguments_for(folder, size, method), *overrides, "--cluster", profile, "--dry-run"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", MODELS)
def test_every_recipe_fits_every_example(size: str, profile: str, tmp_path: Path, capsys) -> None:
    assert dry_run(tmp_path, size, profile, *NEEDS.get((size, profile), [])) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count(" GiB per rank") == 6 and "nothing was submitted" in out
    script = (tmp_path / "run" / "slurm" / "dry_run" / "ppo.sh").read_text()
    assert "--gpus-per-node=8" in script and "module load" not in script


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_and_would_be_submitted(method: str, size: str, tmp_path: Path, capsys) -> None:
    stages = METHODS[method]
    assert dry_run(tmp_path, size, "example-h100", method=method) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count(" GiB per rank") == len(stages) and "nothing was submitted" in out
    scripts = tmp_path / "run" / "slurm" / "dry_run"
    assert {path.stem for path in scripts.glob("*.sh")} >= set(stages)
    arguments = [*arguments_for(tmp_path, size, method), "--cluster", "example-h100"]
    assert main(["plan", *arguments]) == 0, capsys.readouterr().out
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize("profile", PROFILES)
def test_32b_with_adapters_is_trained_by_one_node(profile: str, tmp_path: Path, capsys) -> None:
    one = ["cluster.trainer_nodes=1", *(["parallel.tp=4"] if profile == "example-split" else [])]
    assert dry_run(tmp_path, "32b_lora", profile, *one) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count(" GiB per rank") == 6
    assert main(["plan", *arguments_for(tmp_path, "32b_lora"), "--cluster", profile, *one]) == 0
    assert dry_run(tmp_path, "32b", profile, *one, "parallel.pp=1") == 2
    assert "parallel.pp" in capsys.readouterr().err, "all weights do not fit"


def test_the_7b_recipe_fits_one_node_of_split_gpus(tmp_path: Path, capsys) -> None:
    assert dry_run(tmp_path, "7b", "example-split", "cluster.trainer_nodes=1") == 0, capsys.readouterr().err


def test_offloaded_weights_leave_engines_more_memory(tmp_path: Path, capsys) -> None:
    large = "rollout.engine.gpu_memory_utilization=0.9"
    assert dry_run(tmp_path, "7b", "example-one-node", large) == 2
    assert "or set weight_sync.offload_weights" in capsys.readouterr().err
    assert dry_run(tmp_path, "7b", "example-one-node", large, "weight_sync.offload_weights=true") == 0


FOUR_NODES = ["cluster.trainer_nodes=4", "weight_sync.offload_weights=true"]


@pytest.mark.parametrize(
    ("size", "profile", "overrides", "message"),
    [
        (
            "32b", "example-one-node", ["parallel.pp=1", "rollout.engine.gpu_memory_utilization=0.5"],
            r"(reward_model|ppo) needs about \d+ GiB per GPU \(weights 1.*there are 78",
        ),
        ("32b", "example-one-node", [], r"tp 8 × pp 2 × cp 1 = 16 must divide 8 trainer ranks"),
        ("32b", "example-split", [], r"parallel.tp 8 would span nodes: only 4 ranks are on each of 8 trainer nodes"),
        ("7b", "example-h100", ["cluster.network_interface=lo"], r"lo is a loopback: 4 trainer \+ 4 rollout nodes"),
        ("7b", "example-h100", ["cluster.network_interface=10.0.0.1"], r"address of one node, the job has 4 trainer"),
        ("7b", "example-h100", ["cluster.rollout_nodes=0"], r"4 engines × tp 2 × dp 1 = 8 take 9 GPUs"),
        ("7b", "example-split", ["cluster.trainer_ranks=64"], r"ranks and 1 engines × tp 4 × dp 1 = 4 take 12"),
        ("7b", "example-split", ["cluster.engines_on=rollout_nodes"], r"needs cluster.rollout_nodes > 0"),
        ("7b", "example-h100", ["cluster.engines_on=trainer_gpus"], r"leaves the 4 nodes of cluster.rollout_nodes"),
        ("7b", "example-h100", ["rollout.engine.tp=4"], r"4 engines × tp 4 × dp 1 take 16 GPUs of a node; .* is 8"),
        ("7b", "example-h100", ["parallel.ep=2"], r"it has no experts for parallel.ep 2 to divide"),
        ("7b", "example-one-node", ["ppo.staleness=1"], r"trainer_gpus cannot be combined with ppo.staleness 1"),
        (
            "32b", "example-one-node",
            [*FOUR_NODES, "rollout.engine={tp: 1, per_node: 8}", "cluster.gpu_memory_gib=70"],
            r"during a push a GPU holds the engine's weights \(61.* there are 70: raise rollout.engine.tp",
        ),
        (
            "7b", "example-one-node", ["rollout.engine.gpu_memory_utilization=0.95"],
            r"engines take 0.95 × 80 = 76.0 GiB of a GPU and the trainer keeps \d+\.\d \(.*_utilization to 0\.\d\d",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_numbers(
    size: str, profile: str, overrides: list[str], message: str, tmp_path: Path, capsys
) -> None:
    assert dry_run(tmp_path, size, profile, *overrides) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "run" / "slurm").exists()
