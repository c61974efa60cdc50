"""Experiment files: those that are shipped, what is shared, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.commands.experiment import Chain, link_equal_runs, make_task, plan
from megatron_vcppo.commands.experiment_report import collect
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


CLAIM = "claims: [{text: a, outcome: pass@1, higher: one, than: 0}]"
CORRELATION = "claims: [{text: a, correlation: [pass@1, gain]}]"
SHARED = "[sft, reward_model], per_seed: true"


def refused(file: Path, message: str, folder: Path, capsys) -> None:
    """A dry run ends with one line that has the file's name and the message, and writes nothing."""
    assert main(["experiment", str(file), "--dir", str(folder / "runs"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(file) in line
    assert not (folder / "runs").exists()


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
        (SHARED, "3", "shared.stages must be a list such as [sft, reward_model], got 3"),
        (SHARED, "sft", "shared.stages must be a list such as [sft, reward_model], got 'sft'"),
        (SHARED, "[1]", "shared.stages: no stage 1; there are sft, reward_model"),
        (SHARED, "[[sft]]", "shared.stages: no stage ['sft']"),
        (SHARED, "[foo]", "shared.stages: no stage 'foo'"),
        (SHARED, "[reward_model, sft]", "shared.stages: name each once, in the order of a chain: sft, reward_model"),
        (SHARED, "[sft, sft]", "shared.stages: name each once, in the order of a chain: sft"),
        ("per_seed: true", "per_seed: 'no'", "shared.per_seed must be true or false, got 'no'"),
        ("per_seed: true", "per_seed: null", "shared.per_seed must be true or false, got None"),
        ("own: [reward_model]", "own: 3", "arm its own model: own must be a list of shared stages, got 3"),
        ("own: [reward_model]", "own: null", "own must be a list of shared stages, got None"),
        ("own: [reward_model]", "own: reward_model", "own must be a list of shared stages, got 'reward_model'"),
        ("own: [reward_model]", "own: [[sft]]", "own names ['sft'], which is not among the shared stages"),
        ("title: T", "title: T\n1: x\nfoo: y", "unknown key 1"),
        ("title: T", "title: T\nclaims: [{text: a, 1: x, foo: y}]", "claim 'a': unknown 1"),
        ("title: T", "title: T\ntask: {name: a, 1: x, foo: y}", "task: unknown key 1"),
        ("reward_model.steps: 3", "reward_model.steps: !!binary YQ==", "model: reward_model.steps: no value of a"),
        ("reward_model.steps: 3", "stages: [!!binary YQ==]", "arm its own model: stages: no value of a configuration"),
        ("reward_model.steps: 3", f"reward_model.steps: {'9' * 5000}", ":8: a number of more than 3,500 digits"),
        ("reward_model.steps: 3", f"reward_model.steps: 0x{'f' * 5000}", ":8: a number of more than 3,500 digits"),
        ("reward_model.steps: 3", "reward_model.steps: !!bool maybe", "not valid YAML: a value that cannot be read"),
        ("one: {ppo.critic.init", "one: 3\n  two: {ppo.critic.init", "arm one: expected keys and values, got 3"),
        ("title: T", "title: T\nclaims: 3", "claims must be a list, got 3"),
        ("title: T", "title: T\nclaims: false", "claims must be a list, got False"),
        ("title: T", "title: T\nclaims: {a: b}", "claims must be a list, got {'a': 'b'}"),
        ("title: T", "title: T\nfigures: true", "figures must be a list, got True"),
        ("title: T", "title: T\noutcomes: 3", "outcomes must be a list, got 3"),
        ("title: T", "title: T\noutcomes: pass@1", "outcomes must be a list, got 'pass@1'"),
        ("title: T", "title: T\nagainst: [z]", "against: the name of an arm must be text"),
        ("title: T", f"title: T\n{CLAIM.replace('one', '[z]')}", "claim 'a': the name of an arm must be text"),
        ("title: T", f"title: T\n{CLAIM.replace('one', '{z: 1}')}", "claim 'a': the name of an arm must be text"),
        ("title: T", f"title: T\n{CLAIM.replace('one', '0.95')}", "text (in quotes if it is a number), got 0.95"),
        ("title: T", f"title: T\n{CORRELATION.replace(']}', '], sign: [a]}')}", "sign is positive or negative"),
        ("title: T", "title: T\nfigures: [{scatter: 3}]", "scatter names two outcomes, got 3"),
        (
            "title: T",
            "title: T\nfigures: [{setting: ppo.advantage.lam_actr, outcome: pass@1}]",
            "no configuration key ppo.advantage.lam_actr: did you mean ppo.advantage.lam_actor?",
        ),
        ("title: T", "title: T\nfigures: [{setting: foo, outcome: pass@1}]", "no configuration key foo"),
        ("title: T", "title: T\nfigures: [{curve: sft/loss, stage: sfft}]", "no stage 'sfft'; there are sft"),
        ("title: T", "title: null", "title is empty"),
        ("title: T", "title: ' '", "title is empty"),
        ("title: T", "title: [a]", "title must be text (in quotes if it is a number), got ['a']"),
        ("title: T", "title: {a: b}", "title must be text"),
        ("title: T", "title: T\nquestion: [a]", "question must be text"),
        ("config: demo/vcppo", "config: [a]", "config must name a file, got ['a']"),
        ("{ppo.iterations: 7}", "{run.dir: x}", "set: run.dir follows from --dir of the command: leave it out"),
        ("{ppo.iterations: 7}", "{run: {seed: 3}}", "set: run.seed follows from --seeds of the command"),
        ("per_seed: true", "set: {run.seed: 3}", "shared.set: run.seed follows from --seeds of the command"),
        ("reward_model.steps: 3", "run.dir: x", "arm its own model: run.dir follows from --dir of the command"),
        ("{ppo.iterations: 7}", "{ppo iterations: 7}", "set: override 'ppo iterations=7': expected key=value"),
        ("{ppo.iterations: 7}", "0", "set: expected keys and values, got 0"),
        ("its own model", "'?!'", "arm '?!': its name needs a letter or a digit"),
        ("its own model", "λ", "arm 'λ': its name needs a letter or a digit"),
        ("its own model", "a" * 101, "needs a letter or a digit, and at most 100 of them"),
        ("its own model", '"a\\nb"', "arm 'a\\nb': its name must be one line of plain text"),
        ("title: T", 'title: T\n"a\\nb": 3', "unknown key a b; there are"),
        ("its own model", "true", "arm True: a name must be text: put it in quotes"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(old: str, new: str, message: str, tmp_path: Path, capsys) -> None:
    text = ARMS.replace("PER_SEED", "true")
    assert old in text
    refused(write(tmp_path, text.replace(old, new, 1)), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("3", "task must hold keys and values, got 3"),
        ("false", "task must hold keys and values, got False"),
        ("{}", "task needs a name"),
        ("{kinds: [list_ops]}", "task needs a name, which is that of its folder"),
        ("{name: ..}", "at most 100, got '..'"),
        ("{name: a/b}", "got 'a/b'"),
        ("{name: ''}", "got ''"),
        ("{name: [a]}", "got ['a']"),
        ('{name: "a\\0b"}', "got 'a\\x00b'"),
        ("{name: a, kinds: 3}", "task: kinds must be a list such as [running_sum], got 3"),
        ("{name: a, kinds: null}", "task: kinds must be a list such as [running_sum], got None"),
        ("{name: a, kinds: []}", "task: kinds must be a list"),
        ("{name: a, kinds: [sudoku]}", "task: no kind 'sudoku'; there are running_sum, list_ops"),
        ("{name: a, kinds: [--help]}", "task: no kind '--help'"),
        ("{name: a, kinds: [[search]]}", "task: no kind ['search']"),
        ("{name: a, steps: 5}", "task: vcppo make-task: argument --steps: expected 2 arguments"),
        ("{name: a, steps: [5, 3]}", "task: vcppo make-task: --steps 5 3: task running_sum takes 1 ≤ MIN ≤ MAX"),
        ("{name: a, steps: [1.5, 3]}", "task: vcppo make-task: argument --steps: invalid int value: '1.5'"),
        ("{name: a, layers: true}", "argument --layers: invalid int value: 'True'"),
        ("{name: a, layers: --help}", "task: layers: no value of this option: '--help'"),
        ("{name: a, seed: [1, 2]}", "task: vcppo make-task: unrecognized arguments: 2"),
        ("{name: a, seed: null}", "argument --seed: invalid int value: 'None'"),
        (f"{{name: a, seed: {10**30}}}", "task: vcppo make-task: --seed must fit into 64 bits"),
        ("{name: a, head_size: 0}", "task: vcppo make-task: --head-size must be at least 1"),
        ("{name: a, mistake_rate: .nan}", "--mistake-rate nan is no probability"),
        ("{name: a, family: gpt}", "argument --family: invalid choice: 'gpt'"),
    ],
)
def test_a_task_that_cannot_be_made_is_one_line(task: str, message: str, tmp_path: Path, capsys) -> None:
    text = ARMS.replace("PER_SEED", "true").replace("title: T", f"title: T\ntask: {task}")
    refused(write(tmp_path, text), message, tmp_path, capsys)


@pytest.mark.parametrize("name", ["shared.yaml", "tasks.yaml"])
def test_an_experiment_does_not_take_a_common_folder(name: str, tmp_path: Path, capsys) -> None:
    file = write(tmp_path, ARMS.replace("PER_SEED", "true")).rename(tmp_path / name)
    refused(file, f"DIR/{file.stem} cannot be an experiment's folder", tmp_path, capsys)


def test_what_may_look_wrong_is_taken(tmp_path: Path) -> None:
    text = ARMS.replace("PER_SEED", "true").replace("title: T", "title: T\nclaims: null\ntask: {name: a, seed: -1}")
    experiment = read_experiment(write(tmp_path, text.replace("  one:", "  0.95: null\n  one:")))
    assert [arm.name for arm in experiment.arms] == ["0.95", "one", "its own model"]
    assert experiment.task_arguments == ("--task", "running_sum", "--seed", "-1")


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
