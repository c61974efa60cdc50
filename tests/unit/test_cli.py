"""The command as a user meets it: help, exit codes, one line for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vcppo.cli import COMMANDS, build_parser, main
from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.value_sources import CONFIGS

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo/sft.yaml")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and summary.split()[0] in text for name, (_, summary) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser([name]).parse_args([name, "--help"])
    usage, description, *_ = (text := capsys.readouterr().out).split("\n\n")
    assert f"vcppo {name}" in usage and "``" not in text
    assert not description.startswith(("positional arguments", "options")), "it has no description"


def test_config_prints_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", DEMO, "sft.steps=77"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["sft"]["steps"] == 77
    assert printed["parallel"]["tp"] == 2


def test_config_takes_the_cluster_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, keys = str(CONFIGS / "recipes" / "sft.yaml"), ["run.dir=x", "model.hf=x", "sft.train=x.jsonl"]
    assert main(["config", recipe, *keys, "cluster.trainer_nodes=2", "--cluster", "example-h100"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["cluster"]
    assert (printed["name"], printed["gpus_per_node"], printed["trainer_nodes"]) == ("example-h100", 8, 2)
    assert main(["config", recipe, *keys, "--cluster", "example"]) == 2
    assert "--cluster example: no such profile; available: local, devcluster," in capsys.readouterr().err


def test_explain_covers_every_key_and_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}: " in text for name in all_keys())
    assert not [key.name for key in all_keys().values() if not key.doc], "keys without a text below them"
    assert "default None" not in text and "cluster.qos: text or null (default null)" in text
    assert "  parallel.tp: a whole number in [1, inf) (default 1)\n      Tensor-parallel size" in text
    assert main(["config", "--explain", "sft.optimizer"]) == 0
    text = capsys.readouterr().out
    assert "sft.optimizer.lr: a number in [0, inf) (default 1e-05)" in text and "sft.train" not in text
    assert main(["config", "--explain", "sft.optimizr"]) == 2
    assert "did you mean sft.optimizer?" in capsys.readouterr().err


def test_the_page_of_all_keys_is_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "--markdown"]) == 0
    made, command = capsys.readouterr().out, "vcppo config --explain --markdown > docs/configuration.md"
    assert command in made.splitlines()[2]
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == made, f"run: {command}"
    assert all(f"| `{name.rpartition('.')[2]}` |" in made for name in all_keys())


def test_config_names_a_critic_that_nothing_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vcppo = [str(CONFIGS / "demo" / "vcppo.yaml"), f"run.dir={tmp_path}"]
    assert main(["config", *vcppo, "stages=[sft, ppo]"]) == 2
    message = (
        "ppo.critic.init value_pretrain needs stage value_pretrain, which is neither before ppo in stages (sft, ppo)"
    )
    assert message in capsys.readouterr().err


def test_config_notes_an_old_name_beside_the_printed_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", DEMO, "ppo.skip_limit=7"]) == 0
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["run"]["skip_limit"] == 7
    assert captured.err == "note: command line: ppo.skip_limit is now called run.skip_limit\n"


def test_a_mistake_costs_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "megatron_vcppo.cli", "config", DEMO, "sft.stepz=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "vcppo: error: command line: unknown key sft.stepz; did you mean sft.steps?\n"
    assert not result.stdout


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m megatron_vcppo.cli config --explain | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout and not result.stderr
