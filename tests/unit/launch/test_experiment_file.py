"""Experiment files: those that are shipped, what is shared, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.commands.experiment import Chain, collect, link_equal_runs, make_task, plan
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.experiment_file import FOLDER, find_experiment, read_experiment
from megatron_vcppo.report.experiment_question import Question
from megatron_vcppo.run.folder import RunFolder

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_is_sound(name: str, tmp_path: Path) -> None:
    experiment = read_experiment(find_experiment(name))
    assert experiment.question.claims and experiment.question.question, "an experiment asks something"
    chains = plan(experiment, tmp_path, range(1), None, [], None)
    arms = [chain for chain in chains if chain.run.path.is_relative_to(tmp_path / name)]
    assert len(arms) == len(experiment.arms)
    for chain in arms:
        assert "ppo" in chain.stages
        assert experiment.task is None or chain.config.prompts.train.startswith(str(tmp_path / "tasks"))
        for section in ("reward_model", "value_pretrain", "ppo"):
            if (path := getattr(chain.config, section).__dict__.get("stored_path")) and section in chain.stages:
                assert path.startswith(str(chain.run.path)), "no arm writes into another"
    assert Question.of(experiment.question.as_dict(), name) == experiment.question
    assert not list(tmp_path.iterdir())


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


ARMS = """
title: T
config: demo/vcppo
shared: {stages: [sft, reward_model], per_seed: PER_SEED}
set: {ppo.iterations: 7}
arms:
  one: {ppo.critic.init: reward_model, stages: [sft, reward_model, ppo]}
  its own model: {own: [reward_model], reward_model.steps: 3}
"""


def test_arms_begin_with_what_is_shared(tmp_path: Path) -> None:
    chains = plan(
        read_experiment(write(tmp_path, ARMS.replace("PER_SEED", "true"))),
        tmp_path,
        range(2),
        None,
        ["sft.steps=90"],
        None,
    )
    assert [chain.run.path.relative_to(tmp_path).as_posix() for chain in chains] == [
        "shared/vcppo/seed_0", "mine/one/seed_0", "mine/its_own_model/seed_0",
        "shared/vcppo/seed_1", "mine/one/seed_1", "mine/its_own_model/seed_1",
    ]  # fmt: skip
    shared, one, own = chains[:3]
    assert shared.stages == ["sft", "reward_model"] and shared.base is None and shared.config.stages == shared.stages
    assert one.stages == ["ppo"] and one.base == shared.run and one.config.ppo.critic.init == "reward_model"
    assert own.stages[0] == "reward_model" and own.config.reward_model.steps == 3 and own.base == shared.run
    assert (one.config.ppo.iterations, shared.config.ppo.iterations) == (7, 15), "set is of the arms"
    assert all(chain.config.sft.steps == 90 for chain in chains)
    assert [chain.config.run.seed for chain in chains] == [0, 0, 0, 1, 1, 1]


def test_an_arm_that_another_experiment_has_run_is_not_run_again(tmp_path: Path, capsys) -> None:
    """Equal are settings, data, seed and the stages that it began with; where a run is and its layout do not count."""

    def chain_of(name: str, arm: str, *overrides: str) -> Chain:
        chains = plan(read_experiment(find_experiment(name)), tmp_path, range(1), [arm], overrides, None)
        return chains[-1]

    done = chain_of("components", "VC-PPO")
    same = {
        "failure": "VC-PPO", "pretrain_steps": "100 steps", "lambda_actor": "λ 0.95", "rivals": "VC-PPO",
        "critic_init": "reward model, pretrained",
    }  # fmt: skip
    others = {"components": "pretraining alone", "pretrain_steps": "150 steps", "lambda_actor": "λ 0.90"}
    done.run.path.mkdir(parents=True)
    text = dump_config(done.config)
    assert "  routing_replay: false\n" in text, "a key that is newer than the run"
    done.run.config.write_text(text.replace("  routing_replay: false\n", ""))
    assert not any(chain_of(name, arm).equal for name, arm in same.items()), "the run is not done"
    assert done.base is not None
    for stage in done.config.stages:
        of = done.run if stage in done.stages else done.base
        of.stage(stage).path.mkdir(parents=True)
        of.stage(stage).mark_done()
        if of is done.base:
            shutil.copytree(of.stage(stage).path, done.run.stage(stage).path)
    damaged = RunFolder(tmp_path / "a" / "damaged" / "seed_0")
    shutil.copytree(done.run.path, damaged.path)
    damaged.config.write_text("stages: 7")
    for name, arm in same.items():
        found = chain_of(name, arm, "overrides.sft.parallel.dp=2").equal
        assert found is not None and found.path == done.run.path, name
        assert chain_of(name, arm, "ppo.iterations=3").equal is None
    assert not any(chain_of(name, arm).equal for name, arm in others.items())
    assert main(["experiment", "lambda_actor", "--dir", str(tmp_path), "--seeds", "1", "--dry-run"]) == 0
    assert "0_95/seed_0: ppo, evaluate; the same as components/vc_ppo/seed_0, which is done" in capsys.readouterr().out
    manifest = done.base.stage("sft").manifest
    text = manifest.read_text()
    manifest.write_text(text.replace("{", '{"of": "another SFT model",', 1))
    assert chain_of("lambda_actor", "λ 0.95").equal is None, "it began with other shared stages"
    manifest.write_text(text)
    linked = chain_of("lambda_actor", "λ 0.95")
    link_equal_runs([linked])
    assert linked.run.path.is_symlink() and linked.is_done()
    again = chain_of("lambda_actor", "λ 0.95")
    assert again.is_done() and again.equal is None
    results = collect(read_experiment(find_experiment("lambda_actor")), tmp_path, range(1))
    assert [run.arm for run in results.runs] == ["λ 0.95"]


def test_one_shared_run_may_serve_all_seeds(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path, ARMS.replace("PER_SEED", "false")))
    for seeds in (range(3), range(1, 4)):
        chains = plan(experiment, tmp_path, seeds, ["one"], [], None)
        assert len(chains) == 4 and {chain.base.path.name for chain in chains if chain.base} == {"seed_0"}
        assert {chain.config.run.seed for chain in chains if not chain.is_arm} == {0}
    assert "one for all seeds" in experiment.question.shared


def test_an_arm_sets_no_key_of_a_stage_that_it_takes_from_others(tmp_path: Path, capsys) -> None:
    """The stage would run without it, and the arm's configuration would say otherwise."""
    text = ARMS.replace("PER_SEED", "true")
    assert "  one: " in text
    file = write(tmp_path, text.replace("  one: {", "  one: {sft.steps: 999, "))
    assert main(["experiment", str(file), "--dir", str(tmp_path / "runs"), "--seeds", "1", "--dry-run"]) == 2
    message = f"{file}: one, seed 0: sft.steps is 999, but sft is shared and has 850: add own: [sft] to the arm"
    assert message in capsys.readouterr().err


def test_tasks_of_other_settings_or_in_part_are_refused_before_anything_runs(tmp_path: Path, capsys) -> None:
    text = ARMS.replace("PER_SEED", "true").replace(
        "title: T", "title: T\ntask: {name: tiny, prompts: 8, test: 2, layers: 1}"
    )
    file = write(tmp_path, text)
    call = ["experiment", str(file), "--dir", str(tmp_path / "runs"), "--seeds", "1", "--dry-run"]
    assert main(call) == 0
    folder = tmp_path / "runs" / "tasks" / "tiny"
    arguments = ["--prompts", "8", "--test", "2", "--layers", "1", "--task", "running_sum"]
    assert main(["make-task", "--out", str(folder), *arguments]) == 0 and main(call) == 0
    write(tmp_path, text.replace("prompts: 8", "prompts: 9"))
    capsys.readouterr()
    assert main(call) == 2
    assert (
        f"{folder} exists, made with other settings: choose another --dir, or another task" in capsys.readouterr().err
    )
    (folder / "sft_train.jsonl").unlink()
    assert main(call) == 2
    assert f"{folder} is damaged, it has no sft_train.jsonl: remove it" in capsys.readouterr().err


def test_two_experiments_do_not_make_one_task_at_once(tmp_path: Path) -> None:
    text = ARMS.replace("PER_SEED", "true").replace("title: T", "title: T\ntask: {name: tiny}")
    experiment = read_experiment(write(tmp_path, text))
    tasks = RunFolder(tmp_path / "tasks")
    tasks.make()
    with tasks.locked(), pytest.raises(UserError, match="tasks/tiny: another vcppo experiment makes a task there"):
        make_task(experiment, tmp_path)
    assert not (tmp_path / "tasks" / "tiny").exists()


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    text = ARMS.replace("PER_SEED", "true").replace("title: T", "title: T\ntask: {name: tiny}")
    experiment = read_experiment(write(tmp_path, text))
    for chain in plan(experiment, tmp_path / "before", range(1), None, [], None):
        chain.run.path.mkdir(parents=True)
        chain.run.config.write_text(dump_config(chain.config))
    (tmp_path / "before").rename(tmp_path / "after")
    assert plan(experiment, tmp_path / "after", range(1), None, [], None)


def test_a_run_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path, ARMS.replace("PER_SEED", "true")))
    for chain in plan(experiment, tmp_path, range(1), None, [], None):
        chain.run.path.mkdir(parents=True)
        chain.run.config.write_text(dump_config(chain.config))
    plan(experiment, tmp_path, range(1), None, ["parallel.tokens_per_microbatch=2048"], None)
    with pytest.raises(UserError, match=r"mine/one/seed_0: was begun with sft\.steps=850, now it is 90"):
        plan(experiment, tmp_path, range(1), ["one"], ["sft.steps=90"], None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "titel: T", "unknown key titel"),
        ("title: T", "", "title is missing"),
        ("demo/vcppo", "demo/nothing", "config demo/nothing: no such file"),
        ("own: [reward_model]", "own: [ppo]", "arm its own model: own names ppo, which is not among the shared stages"),
        ("per_seed:", "pro_seed:", "shared: unknown key pro_seed"),
        ("title: T", "title: T\nclaims: [{text: a, outcome: nonsense, higher: one, than: 0}]", "no outcome 'nonsense'"),
        (
            "title: T",
            "title: T\nclaims: [{text: a, outcome: pass@1, higher: two, than: 0}]",
            "no arm 'two'; there are one",
        ),
        ("title: T", "title: T\nclaims: [{text: a, outcome: pass@1, higher: one}]", "than is missing"),
        ("title: T", "title: T\nfigures: [{plot: x}]", "write one of curve, profile, scatter, setting"),
        ("title: T", "title: T\nagainst: two", "against: no arm 'two'"),
        ("its own model", "one?", "two arms have the same name but for punctuation"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(old: str, new: str, message: str, tmp_path: Path, capsys) -> None:
    file = write(tmp_path, ARMS.replace("PER_SEED", "true").replace(old, new))
    assert main(["experiment", str(file), "--dir", str(tmp_path / "runs"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(file) in line
    assert not (tmp_path / "runs").exists()


def test_a_wrong_call_is_one_line(tmp_path: Path, capsys) -> None:
    file = str(write(tmp_path, ARMS.replace("PER_SEED", "true")))
    for call, message in (
        (["experiment"], "needs a NAME, --redraw FILE or --diagnosis FILE"),
        (["experiment", "nothing"], "there are components"),
        (["experiment", file, "--arms", "two", "--dry-run"], "--arms two: no such arm; there are one"),
        (["experiment", file, "ppo.lr=1", "--dry-run"], "command line: unknown key ppo.lr"),
        (["experiment", "--redraw", str(tmp_path / "none.zst")], "none.zst"),
        (["experiment", file, "--report", "--arms", "one"], "--report draws all arms"),
        (["experiment", file, "--out", "page.html"], "--out is the page of --redraw"),
        (["experiment", "--redraw", "x", "--diagnosis", "y"], "exclude each other"),
    ):
        assert main(call) == 2
        assert message in capsys.readouterr().err


def test_a_dry_run_prints_the_chains_and_writes_nothing(tmp_path: Path, capsys) -> None:
    assert main(["experiment", "components", "--seeds", "1", "--dir", str(tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "shared/long_sum/seed_0: sft, reward_model, value_pretrain\n" in out
    assert "components/vc_ppo/seed_0: ppo, evaluate; begins with shared/long_sum/seed_0" in out
    assert not (tmp_path / "runs").exists()


def test_the_documented_file_is_sound(tmp_path: Path) -> None:
    document = FOLDER.parents[1] / "docs" / "experiments.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    experiment = read_experiment(write(tmp_path, text))
    assert len(plan(experiment, tmp_path, range(1), None, [], None)) == 4
    assert experiment.arms[2].own == ("reward_model",) and experiment.shared_overrides == ("sft.steps=2500",)
