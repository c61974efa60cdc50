"""What a refused command leaves behind: nothing, and a run that was there as it was."""

import re
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.commands.arguments import prepare
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.manifest import write_manifest
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
    "sft.optimizer.beta2=1": r"command line: sft.optimizer.beta2 must be in \[0, 1\), got 1.0",
    "stages=[sft,sft]": "stages names sft 2 times",
    "sft.train=/nowhere.jsonl": "sft.train: /nowhere.jsonl does not exist",
    "model.hf=/nowhere": "/nowhere",
    "parallel.pp=4": "2 layers cannot be divided over pp 4",
    "stages=[ppo] prompts.train={data}": "ppo.critic.init value_pretrain needs stage value_pretrain",
    "cluster.gpu_memory_gib=0.1": "sft needs about . GiB per GPU",
}
"""Overrides → the one line that refuses them: rules between keys first, then what needs files."""
STARTS = {
    "run": ["run", "{recipe}"],
    "submit": ["submit", "{recipe}"],
    "dry run": ["submit", "{recipe}", "--dry-run"],
    "sweep": ["sweep", "{recipe}", "run.seed=[0,1]"],
    "last point of a sweep": ["sweep", "{recipe}"],
    "resume": ["resume", "{run}"],
}


@pytest.mark.parametrize("where", ["local", "big"])
@pytest.mark.parametrize("override", WRONG)
@pytest.mark.parametrize("start", STARTS)
def test_every_command_refuses_the_same_before_it_writes_anything(
    start: str, override: str, where: str, recipe: str, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    if start == "resume":
        run.mkdir()
        _, config = prepare(Path(recipe), [f"cluster.name={where}"])
        (run / "config.yaml").write_text(dump_config(config))
    before = sorted(run.rglob("*"))
    overrides = override.format(data=tmp_path / "data.jsonl").split()
    if start == "last point of a sweep":
        key, _, value = overrides[0].partition("=")
        good = {"parallel.tp": "1", "parallel.pp": "1", "sft.optimizer.beta2": "0.5", "stages": "[sft]"}.get(key, "")
        good = good or {"sft.train": f"{tmp_path}/data.jsonl", "model.hf": f"{tmp_path}/model"}.get(key, "80")
        overrides[0] = f"{key}=[{good}, {value}]"
    command = [word.format(recipe=recipe, run=run) for word in STARTS[start]]
    assert main([*command, *overrides, f"cluster.name={where}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(WRONG[override], lines[0]), lines
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("where", ["local", "big"])
@pytest.mark.parametrize("override", [override for override in WRONG if "nowhere" not in override])
def test_config_refuses_what_needs_no_files(override: str, where: str, recipe: str, tmp_path: Path, capsys) -> None:
    overrides = override.format(data="x.jsonl").split()
    refused = not {"parallel.pp", "cluster.gpu_memory_gib"} & {text.partition("=")[0] for text in overrides}
    assert main(["config", recipe, *overrides, f"cluster.name={where}"]) == (2 if refused else 0)
    assert not refused or re.search(WRONG[override], capsys.readouterr().err)


def finished_run(folder: Path, recipe: str) -> RunFolder:
    """A run whose SFT is done."""
    run, config = prepare(Path(recipe), [f"run.dir={folder}"])
    checkpoint = run.stage("sft").checkpoint(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("x")
    write_manifest(run.stage("sft").path, {"checkpoint": "checkpoints/iter_0000001"})
    run.config.write_text(dump_config(config))
    return run


@pytest.mark.parametrize("command", [["run"], ["submit"], ["submit", "--dry-run"], ["sweep", "run.seed=[0,1]"]])
def test_stages_of_another_run_are_taken_only_once_nothing_is_refused(
    command: list[str], recipe: str, tmp_path: Path, capsys
) -> None:
    base = finished_run(tmp_path / "base", recipe)
    taken = [command[0], recipe, *command[1:], "--base", str(base.path), "--from", "export"]
    for wrong in ("model.hf=/nowhere", "parallel.tp=8"):
        assert main([*taken, wrong, "cluster.name=local"]) == 2
    base.stage("sft").manifest.unlink()
    assert main([*taken, "cluster.name=local"]) == 2
    assert "stage sft is not done there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["submit"], ["sweep", "run.seed=[0,1]"]])
def test_without_slurm_no_stage_is_taken(
    command: list[str], recipe: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = finished_run(tmp_path / "base", recipe)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([command[0], recipe, *command[1:], "--base", str(base.path), "--from", "export"]) == 2
    assert "sbatch, srun, squeue, scontrol, scancel not on the path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_no_stages(recipe: str, tmp_path: Path) -> None:
    base = finished_run(tmp_path / "base", recipe)
    assert main(["submit", recipe, "--base", str(base.path), "--from", "export", "--dry-run"]) == 0
    assert not (tmp_path / "run" / "sft").exists()
    assert (tmp_path / "run" / "slurm" / "dry_run" / "export.sh").exists()


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


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_run_at_work_takes_no_stages(command: str, recipe: str, tmp_path: Path, capsys) -> None:
    base = finished_run(tmp_path / "base", recipe)
    run = RunFolder(tmp_path / "run" if command == "run" else tmp_path / "run" / "0")
    run.path.mkdir(parents=True)
    keys = ["cluster.name=local", "run.seed=0" if command == "run" else "run.seed=[0,1]"]
    with run.locked():
        before = sorted(run.path.rglob("*"))
        assert main([command, recipe, *keys, "--base", str(base.path), "--from", "export"]) == 2
        assert "another vcppo run or submit is at work in this run" in capsys.readouterr().err
        assert sorted(run.path.rglob("*")) == before


def test_a_wrong_point_of_a_sweep_is_refused_before_the_first_starts(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["sweep", recipe, "sft.optimizer.lr=[0.1, fast]"]) == 2
    assert "sft.optimizer.lr must be a number in [0, inf), got 'fast'" in capsys.readouterr().err
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
