"""Who may read a run, which folders become one, and what a configuration may put into a batch script."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from megatron_vcppo.cli import main
from megatron_vcppo.commands.arguments import prepare
from megatron_vcppo.config.load import dump_config, load_config
from megatron_vcppo.config.sections.run import Access
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.launch.snapshot import take_snapshot
from megatron_vcppo.run.access import as_made_here, umask
from megatron_vcppo.run.config_file import write_config
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.submission import executor
from tests.helpers.recipes import write_sft_recipe
from tools.benchmarks._tiny_chains import TINY, tiny_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_sft_recipe(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_run_folder_is_private_unless_a_key_opens_it(recipe: Path, tmp_path: Path) -> None:
    run, config = prepare(recipe, [])
    run.make()
    assert mode(run.path) == 0o700, "before the configuration is in it"
    modes: dict[Access, int] = {"group": 0o2750, "private": 0o700}
    for access, expected in modes.items():
        config.run.access = access
        write_config(run, config)
        assert mode(run.path) == expected
    run.path.chmod(0o755)
    write_config(run, config)
    assert mode(run.path) == 0o700
    run.path.chmod(0o755)
    config.run.access = "as_is"
    write_config(run, config)
    assert mode(run.path) == 0o755


@pytest.mark.parametrize(("access", "closed"), [("private", 0o077), ("group", 0o027)])
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_what_a_run_makes_keeps_its_readers_wherever_it_is_moved(
    access: Access, closed: int, mask: int, tmp_path: Path
) -> None:
    """Logs of ranks and of what they are forked from, checkpoints, metrics; a command's other files are the user's."""
    config = tiny_config(tmp_path / "run", ranks=1, steps=2)
    config.run.access = access
    run, elsewhere = RunFolder.of(config), tmp_path / "elsewhere"
    before = os.umask(mask)
    try:
        assert run_chain(run, config, ["sft"], TINY) == 0
        elsewhere.touch()
    finally:
        os.umask(before)
    secrets = {run.stage("sft").rendezvous, *run.stage("sft").rendezvous.rglob("*")}
    made = [path for path in run.path.rglob("*") if not path.is_symlink()]
    assert any(path.suffix == ".log" and path.stat().st_size for path in made)
    for path in made:
        allowed = (0o700 if path in secrets else 0o777 & ~closed) & (0o777 if path.is_dir() else 0o666)
        assert mode(path) & 0o777 == allowed, path
    assert mode(elsewhere) == 0o666 & ~mask


def test_a_report_follows_the_run_that_it_is_written_into(recipe: Path, tmp_path: Path) -> None:
    run, config = prepare(recipe, [])
    run.make()
    write_config(run, config)
    assert main(["report", str(run.path)]) == main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    assert mode(run.path / "report.html") == 0o600 and mode(tmp_path / "page.html") == 0o666 & ~umask()


@pytest.mark.parametrize("mask", [0o027, 0o022])
def test_files_of_safetensors_have_the_mode_of_others(mask: int, tmp_path: Path) -> None:
    """A group that may read a run reads its adapters and checkpoints, too."""
    before = os.umask(mask)
    try:
        save_file({"a": np.zeros(1)}, tmp_path / "a.safetensors")
        as_made_here(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.safetensors") == 0o666 & ~mask


@pytest.mark.parametrize("command", ["dry run", "role"])
def test_processes_of_a_run_follow_its_access(command: str, recipe: Path, tmp_path: Path) -> None:
    """Also one that was not started by vcppo: under torchrun, or by hand."""
    run, config = prepare(recipe, [])
    before = os.umask(0)
    try:
        if command == "dry run":
            assert main(["submit", str(recipe), "--dry-run"]) == 0
        else:
            run.make()
            write_config(run, config)
            run.config.chmod(0o600)
            role = [sys.executable, "-m", "megatron_vcppo.stages", "sft", "--config", str(run.config)]
            subprocess.run(role, capture_output=True, timeout=120)
    finally:
        os.umask(before)
    made = list(run.path.rglob("*"))
    assert len(made) > 1
    assert not [path for path in made if mode(path) & 0o077]


@pytest.mark.parametrize("mask", [0o000, 0o002])
def test_nobody_else_may_write_into_a_run(mask: int, recipe: Path, tmp_path: Path) -> None:
    """A group that may read a run (run.access) could otherwise change the code and commands that it runs."""
    before = os.umask(mask)
    try:
        assert main(["config", str(recipe)]) == 0
        run, config = prepare(recipe, ["run.access=group"])
        run.make()
        write_config(run, config)
        take_snapshot(run)
    finally:
        os.umask(before)
    made = [run.path, *run.path.rglob("*")]
    assert len(made) > 100, "with the snapshot of the code"
    assert not [path for path in made if mode(path) & 0o022]


def test_a_run_that_was_made_before_keeps_its_mode(recipe: Path, tmp_path: Path) -> None:
    run, config = prepare(recipe, [])
    run.path.mkdir(mode=0o755)
    stored = yaml.safe_load(dump_config(config))
    del stored["run"]["access"]
    run.config.write_text(yaml.safe_dump(stored))
    assert prepare(recipe, [])[1].run.access == "as_is"
    write_config(*prepare(recipe, []))
    assert mode(run.path) == 0o755


@pytest.mark.parametrize(
    "value", ["${oc.env:MY_TOKEN}", "a-${oc.env:MY_TOKEN,none}", "${oc.decode:${oc.env:MY_TOKEN}}"]
)
def test_a_value_of_the_environment_gets_into_no_run(
    value: str, recipe: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    values = yaml.safe_load(recipe.read_text())
    values["run"]["wandb_project"] = value
    recipe.write_text(yaml.safe_dump(values))
    for command in (["submit", str(recipe), "--dry-run"], ["run", str(recipe), "cluster.name=local"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "run.wandb_project" in error and "may hold no values of the environment" in error
        assert "s3cret" not in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    [
        "cluster.environment.HF_TOKEN=hf_x",
        "cluster.environment.MY_APIKEY=x",
        "cluster.setup=['module load x', 'export HF_TOKEN=hf_x']",
        "cluster.setup=['A=1 WANDB_API_KEY=x true']",
        "cluster.sbatch.export='ALL,HF_TOKEN=hf_x'",
        "overrides.sft.cluster.sbatch.export='ALL,HF_TOKEN=hf_x'",
        "overrides.sft.cluster.sbatch.comment='HF_TOKEN=x'",
        "cluster.sbatch.comment='HF_TOKEN=x'",
        "cluster.environment.GITHUB_PAT=x",
        "cluster.environment.AUTH='Bearer x'",
        "cluster.environment.DB_PASS=x",
        "cluster.environment.HEADER='Bearer x'",
        "cluster.environment.HEADER='Basic dXNlcjpwYXNz'",
        "cluster.environment.HTTPS_PROXY='http://user:pass@proxy:3128'",
        "cluster.setup=['export HF_TOKEN=\"hf_x\"', 'true']",
        "cluster.setup=[\"export MY_PASSWD='x'\"]",
        f"cluster.setup=['huggingface-cli login {'hf_' + 34 * 'x'}']",
        "run.notify='HF_TOKEN=x curl https://x.org'",
        "run.notify='curl -H \"Authorization: Bearer x\" https://x.org'",
        "run.notify='curl -H \"Authorization: token x\" https://x.org'",
        "run.notify='curl -H \"X-Api-Key: x\" https://x.org'",
        "run.notify='curl --oauth2-token x https://x.org'",
        "run.notify='curl https://x.org/?a=b&token=hf_x'",
        "run.notify='curl https://me:pw@x.org/'",
        "model.hf='https://x.org/model?token=hf_x'",
        f"run.wandb_project=sk-proj-{20 * 'aA1'}",
        "rollout.engine.extra_args=['--hf-token=x']",
        "prompts.mix={'https://x.org/?token=x': 1.0}",
    ],
)
def test_a_secret_is_refused(override: str, recipe: Path) -> None:
    with pytest.raises(UserError, match="looks like a secret") as failure:
        load_config(recipe, [override])
    assert str(failure.value).count("looks like a secret") == 1 and "hf_x" not in str(failure.value)


@pytest.mark.parametrize(
    "override",
    [
        "cluster.environment.TOKENIZERS_PARALLELISM='false'",
        "prompts.system='The Bearer of news wins: end with answer_key=42, or Final-Key: 42.'",
        "cluster.setup=['export HF_TOKEN=$(cat ~/.token)', 'export KEYBOARD=us']",
        "cluster.setup=['export HF_TOKEN=\"$(cat ~/.token)\"', 'export HF_TOKEN=`cat ~/.token` A_KEY= B_KEY=\"\"']",
        "run.notify='curl -H \"Authorization: Bearer `cat ~/.token`\" https://x.org'",
        "cluster.setup=['gh auth login --with-token < ~/.token', 'export HF_TOKEN_PATH=/home/me/.token']",
        "cluster.environment={SSH_AUTH_SOCK: /tmp/x, NVTE_COMPAT: '1', MONITOR: 'Bearer $TOKEN', BYPASSED: 'a'}",
        'run.notify=\'curl -H "Authorization: Bearer $TOKEN" -H "X-Api-Key: \\${KEY}" https://me:$PW@x.org\'',
        'run.notify=\'curl -s -H "Authorization: token $(cat ~/.token)" -d "$VCPPO_EVENT: x" https://x.org/a?b=c\'',
        'run.notify=\'TOKEN=$(cat f) && curl --oauth2-bearer "$TOKEN" --data-urlencode "key=$KEY" https://x.org:80/@me\'',
        "prompts.template='Basic arithmetic. Answer key: {prompt} tokens=5 a=b'",
        "model.hf=models/hf_checkpoints-of-sk-learn-based-model-Version-2",
        "sft.train='/data/key=3/x@y:z/tokens.jsonl'",
        "cluster.sbatch={reservation: big, mail-user: a@b.c, comment: 'it''s \"quoted\"'}",
    ],
)
def test_what_is_no_secret_passes(override: str, recipe: Path) -> None:
    load_config(recipe, [override])


INJECTED = "touch /tmp/injected"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "dir", f"runs/x\n{INJECTED}"),
        ("run", "dir", "runs/\0x"),
        ("cluster", "partition", f"gpu\n{INJECTED}"),
        ("cluster", "account", f"me\r\n{INJECTED}"),
        ("cluster", "qos", f"low\n#SBATCH --uid=0\n{INJECTED}"),
        ("cluster", "python", f"python\n{INJECTED}"),
        ("cluster", "container_image", f"x\n{INJECTED}"),
        ("cluster", "sbatch", {"comment": f"x\n{INJECTED}"}),
        ("cluster", "sbatch", {f"comment=x\n{INJECTED}\n#": "x"}),
        ("cluster", "environment", {f"A=1; {INJECTED}; B": "x"}),
        ("overrides", "sft", {"cluster": {"partition": f"gpu\n{INJECTED}"}}),
        ("overrides", "sft", {"cluster": {"sbatch": {"comment": f"x\n{INJECTED}"}}}),
        ("overrides", "sft", {"cluster": {"sbatch": {f"comment=x\n{INJECTED}\n#": "x"}}}),
    ],
)
def test_no_value_becomes_a_line_of_the_batch_script(
    section: str, key: str, value: object, recipe: Path, tmp_path: Path, capsys
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values.setdefault(section, {})[key] = value
    recipe.write_text(yaml.safe_dump(values))
    before = sorted(tmp_path.rglob("*"))
    assert main(["submit", str(recipe), "--dry-run"]) == 2
    assert f"{section}.{key}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu\nx"),
        ("qos", "a\rx"),
        ("wckey", "x\n"),
        ("sbatch", {"comment": "\n"}),
        ("sbatch", {"a\n": "x"}),
    ],
)
def test_no_parameter_becomes_a_line_whoever_made_the_configuration(key: str, value: object, recipe: Path) -> None:
    run, config = prepare(recipe, [])
    setattr(config.cluster, key, value)
    with pytest.raises(UserError, match="the batch script would have a control character"):
        executor(run, config, "sft", run.code, RoleCommands(), None)


def test_a_run_folder_and_an_interpreter_are_no_lines_either(recipe: Path, tmp_path: Path) -> None:
    run, config = prepare(recipe, [])
    for folder, python in (("a\nb", "python"), ("a", "python\nx")):
        with pytest.raises(UserError, match="the batch script would have a control character"):
            executor(RunFolder(tmp_path / folder), config, "sft", run.code, RoleCommands(python=python), None)


@pytest.mark.parametrize("name", ["%j", "a%b", "a:b", "a\\b", "", " ", "~nobody/x"])
def test_a_name_that_slurm_or_python_would_read_otherwise_is_refused(name: str, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.dir"):
        load_config(recipe, [f"run.dir='{name}'"])


UNREADABLE = ["a%j", "a:b", "a\\b", "a\nb"]


@pytest.mark.parametrize("given", ["runs/x", "~/x", "."])
@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("command", [["submit"], ["submit", "--dry-run"], ["sweep", "run.seed=[0,1]"]])
def test_the_folders_above_a_run_are_read_as_its_name_is(
    command: list[str], name: str, given: str, recipe: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert main([command[0], str(recipe), *command[1:], f"run.dir={given}"]) == 2
    error = capsys.readouterr().err
    assert str(folder)[:-3] in error and "choose another name" in error and len(error.splitlines()) == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize("overrides", [[], ["sft.steps=500"]])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_run_that_was_renamed_so_is_not_submitted(
    name: str, overrides: list[str], recipe: Path, tmp_path: Path, capsys
) -> None:
    run, config = prepare(recipe, [])
    run.make()
    write_config(run, config)
    renamed = run.path.rename(tmp_path / name)
    before = sorted(renamed.rglob("*"))
    assert main(["resume", str(renamed), *overrides]) == 2
    error = capsys.readouterr().err
    assert "choose another name" in error and sorted(renamed.rglob("*")) == before


@pytest.mark.parametrize("name", ["two words", "it's", 'a"b', "$HOME", "a;b", "`id`", "x&y"])
def test_other_names_are_quoted(name: str, recipe: Path, tmp_path: Path, capsys) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["run"]["dir"] = str(tmp_path / name)
    recipe.write_text(yaml.safe_dump(values))
    assert main(["submit", str(recipe), "--dry-run"]) == 0, capsys.readouterr().err
    script = (tmp_path / name / "slurm" / "dry_run" / "sft.sh").read_text()
    lines = [line for line in script.splitlines() if "PYTHONPATH=" in line]
    assert shlex.split(lines[0])[1].startswith(f"PYTHONPATH={tmp_path / name}/code/")
    assert RunFolder(tmp_path / name).config.exists()


def test_a_tilde_is_the_users_home(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run, config = prepare(recipe, ["run.dir=~/mine"])
    assert run.path == tmp_path / "home" / "mine" and config.run.dir == str(run.path)


COMMANDS = {
    "run": ["run", "{recipe}", "cluster.name=local"],
    "submit": ["submit", "{recipe}"],
    "dry run": ["submit", "{recipe}", "--dry-run"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["thesis.tex", "config.yaml"])
def test_a_folder_that_is_no_run_is_left_alone(
    file: str, command: str, recipe: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / file).write_text("sft: {steps: 3}\n")
    monkeypatch.chdir(folder)
    for place in (str(folder), "."):
        assert main([*(word.format(recipe=recipe) for word in COMMANDS[command]), f"run.dir={place}"]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error and "choose another run.dir" in error and len(error.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == [file]
    assert (folder / file).read_text() == "sft: {steps: 3}\n"
