"""Which part of the chain a command means."""

from pathlib import Path

import pytest

from megatron_vcppo.commands.arguments import chosen_stages
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.config_file import open_run


def test_chosen_stages() -> None:
    chain = ["sft", "value_pretrain", "ppo", "export"]
    assert chosen_stages(chain, "value_pretrain", "ppo", None) == ["value_pretrain", "ppo"]
    assert chosen_stages(chain, None, None, "ppo") == ["ppo"]
    with pytest.raises(UserError, match="'pp' is not in this configuration's stages: sft"):
        chosen_stages(chain, "pp", None, None)
    with pytest.raises(UserError, match="--from ppo comes after --until sft"):
        chosen_stages(chain, "ppo", "sft", None)


def test_a_folder_inside_a_run_is_refused_with_the_runs_name(tmp_path: Path) -> None:
    run, inside = tmp_path / "run", tmp_path / "run" / "ppo" / "checkpoints"
    inside.mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"checkpoints: not a run folder: it has no config\.yaml$"):
        open_run(inside)
    (run / "config.yaml").touch()
    (run / "events.jsonl").touch()
    for folder in (inside, run / "ppo", run / "misspelled"):
        with pytest.raises(UserError, match=f"not a run folder: it has no config.yaml; the run is {run}$"):
            open_run(folder)
