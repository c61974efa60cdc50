"""A stage's own layout and nodes: what it reads, what it requests, what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.placement import data_parallel_size, trainer_ranks
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.chain_plan import plan_chain
from megatron_vcppo.launch.local_chain import local_processes
from megatron_vcppo.launch.memory_plan import check_memory
from megatron_vcppo.launch.role_commands import trainer_layout
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.srun import stage_nodes
from tools.benchmarks._tiny_models import save_tiny_model

CHAIN: dict[str, Any] = {
    "run": {"dir": "run"},
    "model": {"hf": "model"},
    "stages": ["sft", "reward_model", "ppo", "evaluate", "export"],
    "sft": {"train": "train.jsonl", "steps": 100},
    "prompts": {"train": "train.jsonl", "test": "test.jsonl"},
    "parallel": {"tp": 4},
    "cluster": {"name": "big", "trainer_nodes": 4, "rollout_nodes": 2, "gpus_per_node": 8, "cpus_per_node": 64},
}


def load(folder: Path, overrides: dict[str, Any], **sections: Any) -> Config:
    path = folder / "config.yaml"
    content = {**CHAIN, **sections, "overrides": overrides}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_config(path)


def test_a_stage_reads_its_own_values_and_the_others_those_of_the_chain(tmp_path: Path) -> None:
    own = {"parallel": {"tp": 2, "recompute": "full"}, "cluster": {"trainer_nodes": 2, "rollout_nodes": 0}}
    config = load(tmp_path, {"sft": own, "evaluate": {"cluster": {"trainer_nodes": 1}}})
    sft, ppo = stage_config(config, "sft"), stage_config(config, "ppo")
    assert (sft.parallel.tp, sft.parallel.recompute, sft.cluster.trainer_nodes, sft.cluster.rollout_nodes) == (
        2,
        "full",
        2,
        0,
    )
    assert sft.parallel.tokens_per_microbatch == config.parallel.tokens_per_microbatch and sft.sft == config.sft
    assert stage_config(sft, "sft") == sft and ppo is config and config.parallel.tp == 4
    assert [stage_nodes(config, stage) for stage in config.stages] == [2, 6, 6, 3, 1]
    assert [trainer_layout(config, stage) for stage in ("sft", "ppo", "evaluate")] == [(2, 8), (4, 8), (1, 8)]


def test_without_overrides_sft_and_export_hold_no_rollout_nodes(tmp_path: Path) -> None:
    config = load(tmp_path, {})
    assert [stage_nodes(config, stage) for stage in ("sft", "ppo", "export")] == [4, 6, 1]


@pytest.mark.parametrize(
    ("parallel", "own", "nodes", "replicas"),
    [
        ({"tp": 4}, {}, 1, 2),
        ({"tp": 4, "dp": 8}, {}, 1, 2),
        ({"tp": 8, "pp": 2}, {}, 2, 1),
        ({"tp": 8, "pp": 4}, {}, 4, 1),
        ({"tp": 1, "ep": 16}, {}, 2, 16),
        ({"tp": 4}, {"parallel": {"tp": 8, "pp": 2}}, 2, 1),
        ({"tp": 4}, {"cluster": {"partition": "small"}}, 1, 2),
        ({"tp": 4}, {"cluster": {"trainer_nodes": 3}}, 3, 6),
        ({"tp": 4}, {"parallel": {"dp": 8}}, 4, 8),
    ],
)
def test_an_evaluation_takes_the_fewest_nodes_that_hold_a_replica(
    tmp_path: Path, parallel: dict[str, int], own: dict[str, Any], nodes: int, replicas: int
) -> None:
    """Unless its overrides name a number; and the same in the job, on its nodes and in the plan."""
    config = load(tmp_path, {"evaluate": own}, parallel=parallel)
    evaluate = stage_config(config, "evaluate")
    assert trainer_layout(config, "evaluate") == trainer_layout(evaluate, "evaluate") == (nodes, 8)
    assert stage_nodes(config, "evaluate") == stage_nodes(evaluate, "evaluate") == nodes + 2
    assert data_parallel_size(evaluate.parallel, trainer_ranks(evaluate)) == replicas
    assert evaluate.parallel.dp in (None, replicas)
    assert stage_config(evaluate, "evaluate") == evaluate and stage_nodes(config, "ppo") == 6
    if parallel.get("ep", 1) == evaluate.parallel.pp == 1:
        (plan,) = plan_chain(Architecture.from_hf(save_tiny_model(tmp_path / "model")), config, ["evaluate"])
        assert (plan.nodes, plan.ranks) == (nodes + 2, nodes * 8)


def test_an_evaluation_with_engines_on_the_trainers_nodes_keeps_them(tmp_path: Path) -> None:
    cluster = CHAIN["cluster"] | {"rollout_nodes": 0, "engines_on": "trainer_gpus"}
    config = load(tmp_path, {}, cluster=cluster)
    assert stage_config(config, "evaluate") is config and stage_nodes(config, "evaluate") == 4


def test_an_overridden_stage_without_engines_uses_the_gpus_that_they_would_take(tmp_path: Path) -> None:
    cluster = {"name": "big", "trainer_nodes": 2, "gpus_per_node": 8, "engines_on": "trainer_nodes"}
    rollout = {"engine": {"per_node": 1, "tp": 4}}
    config = load(tmp_path, {"sft": {"parallel": {"tp": 8}}}, cluster=cluster, rollout=rollout)
    assert trainer_ranks(stage_config(config, "ppo")) == 8
    assert trainer_ranks(stage_config(config, "sft")) == 16
    config = load(tmp_path, {"ppo": {"parallel": {"tp": 2}}}, cluster=cluster, rollout=rollout)
    assert trainer_ranks(stage_config(config, "ppo")) == 8


def test_the_memory_plan_is_that_of_the_stages_layout(tmp_path: Path) -> None:
    config = load(tmp_path, {"sft": {"parallel": {"tp": 2}}})
    arch = Architecture.from_hf(save_tiny_model(tmp_path / "model"))
    wide = check_memory(arch, config, ["sft"])["sft"]
    config = load(tmp_path, {"sft": {"parallel": {"tp": 1, "tokens_per_microbatch": 65536}}})
    assert check_memory(arch, config, ["sft"])["sft"] > wide


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stf": {}}, r"config.yaml:\d+: overrides.stf: no such stage; stages are sft, "),
        ({"sft": {"optimizer": {"lr": 1}}}, r"overrides.sft.optimizer: only parallel and cluster"),
        ({"sft": {"parallel": {"pt": 2}}}, r"config.yaml:\d+: overrides.sft.parallel.pt: unknown key; did you mean"),
        ({"sft": {"parallel": {"tp": "two"}}}, r"overrides.sft.parallel.tp must be a whole number .*, got 'two'"),
        ({"sft": {"parallel": {"tp": 0}}}, r"overrides.sft.parallel.tp must be in \[1, inf\), got 0"),
        (
            {"sft": {"cluster": {"name": "small"}}},
            r"overrides.sft.cluster.name: all stages of a run share cl",
        ),
        ({"sft": 3}, r"overrides.sft is a section with parallel and cluster, got 3"),
        ({"sft": {"parallel": 3}}, r"overrides.sft.parallel is a section with keys, got 3"),
        ({"sft": {"parallel": {"tp": 3}}}, r"overrides.sft: parallel: tp 3 .* must divide 32 trainer ranks"),
        ({"ppo": {"cluster": {"rollout_nodes": 0, "engines_on": "rollout_nodes"}}}, r"overrides.ppo: .*got 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load(tmp_path, overrides)
    assert re.search(message, str(raised.value)), str(raised.value)


def test_the_command_line_adds_to_the_file(tmp_path: Path) -> None:
    load(tmp_path, {"sft": {"parallel": {"tp": 2}}})
    config = load_config(tmp_path / "config.yaml", ["overrides.sft.cluster.trainer_nodes=1"])
    own = stage_config(config, "sft")
    assert (own.parallel.tp, own.cluster.trainer_nodes) == (2, 1)


def test_a_stage_starts_as_many_ranks_as_its_own_layout_has(tmp_path: Path) -> None:
    run = {"dir": str(tmp_path / "run")}
    config = load(tmp_path, {"sft": {"parallel": {"tp": 1, "dp": 3}}}, run=run, parallel={"tp": 2}, cluster={})
    started = {}
    for stage in ("sft", "ppo"):
        processes = local_processes(RunFolder.of(config), config, stage)
        started[stage] = [process.role for process in processes]
        ranks = [process for process in processes if process.role == "trainer"]
        assert {process.env["WORLD_SIZE"] for process in ranks} == {str(len(ranks))}
    assert started == {"sft": ["trainer"] * 3, "ppo": ["trainer"] * 2 + ["rollout"]}


def test_rules_about_requests_are_for_a_stages_own_values_too(tmp_path: Path) -> None:
    """A chain that requests memory per CPU, a stage that requests it per node."""
    cluster = CHAIN["cluster"] | {"sbatch": {"mem-per-cpu": "8G"}}
    own = {"ppo": {"cluster": {"memory_per_node_gb": 100}}}
    with pytest.raises(UserError, match=r"overrides\.ppo: cluster\.sbatch\.mem-per-cpu and .* 100 both request memory"):
        load(tmp_path, own, cluster=cluster)
    with pytest.raises(UserError, match=r"memory_per_node_gb 9 both request memory") as failure:
        load(tmp_path, {"ppo": {"cluster": {"trainer_nodes": 2}}}, cluster=cluster | {"memory_per_node_gb": 9})
    assert "overrides" not in str(failure.value), "the chain's problem is not repeated"
