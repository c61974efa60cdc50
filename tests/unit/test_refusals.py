"""What a refused command leaves behind: nothing, and a run that was there as it was."""

import re
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from tools.benchmarks._tiny_chains import tiny_model


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A chain of SFT and export on two GPU nodes, and its data."""
    (tmp_path / "data.jsonl").touch()
    text = f"""
run: {{dir: {tmp_path}/run}}
model: {{hf: {tiny_model(tmp_path / "model")}}}
sft: {{train: {tmp_path}/data.jsonl}}
cluster: {{name: big, trainer_nodes: 2, gpus_per_node: 4}}
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


WRONG = {
    "parallel.tp=8": "parallel.tp 8 would span nodes: .* lower it to at most 4",
    "sft.train=/nowhere.jsonl": "sft.train: /nowhere.jsonl does not exist",
    "model.hf=/nowhere": "/nowhere",
    "cluster.stage_time_limit_minutes.ppo=10": "names no stage of this chain: ppo",
}


@pytest.mark.parametrize("override", WRONG)
@pytest.mark.parametrize("command", [["submit", "--dry-run"], ["sweep", "run.seed=[0,1]"], ["submit"]])
def test_a_refusal_writes_no_run(command: list[str], override: str, recipe: str, tmp_path: Path, capsys) -> None:
    assert main([command[0], recipe, override, *command[1:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ("--dry-run" not in command or re.search(WRONG[override], lines[0])), lines
    assert not list(tmp_path.glob("run/**/config.yaml"))


@pytest.mark.parametrize("override", ["parallel.tp=8", "sft.optimizer.lr=0.5"])
def test_a_dry_run_and_a_refusal_leave_a_run_its_configuration(override: str, recipe: str, tmp_path: Path) -> None:
    assert main(["submit", recipe, "--dry-run"]) == 0
    config = tmp_path / "run" / "config.yaml"
    before = config.read_text()
    assert main(["submit", recipe, override, "--dry-run"]) == (2 if "tp" in override else 0)
    assert main(["resume", str(tmp_path / "run"), "parallel.tp=8"]) == 2
    assert config.read_text() == before and not events.read(tmp_path / "run")
    if "lr" in override:
        assert "lr: 0.5" in (tmp_path / "run" / "slurm" / "dry_run" / "config.yaml").read_text()


def test_a_run_at_work_keeps_its_configuration(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["submit", recipe, "--dry-run"]) == 0
    run = RunFolder(tmp_path / "run")
    before = run.config.read_text()
    with run.locked():
        assert main(["run", recipe, "cluster.name=local", "sft.steps=300"]) == 2
    assert "another vcppo run or submit is at work in this run" in capsys.readouterr().err
    assert run.config.read_text() == before


def test_a_wrong_point_of_a_sweep_is_refused_before_the_first_starts(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["sweep", recipe, "sft.optimizer.lr=[0.1, fast]"]) == 2
    assert "sft.optimizer.lr must be a number, got 'fast'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(recipe: str, tmp_path: Path, capsys) -> None:
    under_a_file = tmp_path / "data.jsonl" / "run"
    for command in (["run", recipe, "cluster.name=local"], ["submit", recipe, "--dry-run"]):
        assert main([*command, f"run.dir={under_a_file}"]) == 2
        assert capsys.readouterr().err == f"vcppo: error: run.dir {under_a_file}: Not a directory\n"


NO_VERIFIER = {
    "prompts.verifiers.math=math_percents": "prompts.verifiers.math: no verifier 'math_percents'; use one of code, ",
    "prompts.verifiers={math: 3}": "prompts.verifiers.math: no verifier '3'",
    "prompts.verifiers.math=mine.judge": "no verifier 'mine.judge'; .* or module:function",
    "rewards.code.checkers.graph=graph": "rewards.code.checkers.graph: 'graph' must be module:function",
    "rewards.code.checkers.graph='my module:f'": "'my module:f' must be module:function",
}


@pytest.mark.parametrize("override", NO_VERIFIER)
def test_a_verifier_that_there_cannot_be_is_refused_before_sft(
    override: str, recipe: str, tmp_path: Path, capsys
) -> None:
    keys = [f"prompts.train={tmp_path}/data.jsonl", "ppo.critic.init=sft"]
    for command in (["submit", recipe, "--dry-run"], ["run", recipe, "cluster.name=local"]):
        assert main([*command, *keys, "stages=[sft,ppo]", override]) == 2
        assert re.search(NO_VERIFIER[override], capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_copy_of_a_profile_works_from_any_folder(path: Path, recipe: str, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "my-cluster.yaml"
    copy.write_text(path.read_text())
    small = ["rollout.engine={per_node: 1, tp: 1}", "cluster.trainer_nodes=1"]
    assert main(["submit", recipe, *small, "--cluster", str(copy), "--dry-run"]) == 0, capsys.readouterr().err
