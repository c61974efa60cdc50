"""Runs that begin with the finished stages of another one."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.inherit import stages_to_take, take_stages
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.manifest import write_manifest
from tools.benchmarks._tiny_chains import tiny_config, tiny_model, write_config


def finish(run: RunFolder, stage: str, size: int = 100_000) -> None:
    """A stage as it is when it is done: a checkpoint, a log, and what only belongs to that attempt."""
    checkpoint = run.stage(stage).checkpoint(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(size))
    run.stage(stage).rendezvous.mkdir()
    run.stage(stage).metrics.write_text('{"iteration": 1}\n')
    write_manifest(checkpoint, {})
    run.stage(stage).mark_done(checkpoint=checkpoint)


def test_a_base_that_formatted_prompts_otherwise_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a run that was made before prompts went through the chat template."""
    configs = [tiny_config(tmp_path / name, ("sft", "ppo")) for name in ("base", "arm")]
    for config in configs:
        config.ppo.critic.init = "sft"
    base, run = map(write_config, configs)
    finish(base, "sft")
    stages_to_take(run, configs[1], base.path, "ppo")
    assert capsys.readouterr().out == ""
    stored = yaml.safe_load(base.config.read_text())
    del stored["prompts"]["apply_chat_template"]
    base.config.write_text(yaml.safe_dump(stored))
    stages_to_take(run, configs[1], base.path, "ppo")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "formatted prompts otherwise" in out
    assert "the prompts that its models know: prompts.apply_chat_template=false" in out


def test_nothing_outside_of_the_base_is_taken(tmp_path: Path) -> None:
    configs = [tiny_config(tmp_path / name, ("sft", "ppo")) for name in ("base", "arm")]
    for config in configs:
        config.ppo.critic.init = "sft"
    base, run = map(write_config, configs)
    finish(base, "sft")
    stage = base.stage("sft")
    (stage.path / "rollouts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for place in (stage.checkpoint(1) / "hf.json", stage.path / "metrics.tsv", stage.path / "rollouts" / "1"):
        for target in ("/etc/hostname", tmp_path / "elsewhere"):
            place.symlink_to(target)
            with pytest.raises(UserError, match="a symbolic link that leads out of"):
                stages_to_take(run, configs[1], base.path, "ppo")
            place.unlink()
    taken = stages_to_take(run, configs[1], base.path, "ppo")
    pipe = stage.path / "rollouts" / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe: neither a file nor a folder"):
        take_stages(run, taken)
    pipe.unlink()
    assert not run.stage("sft").path.exists()
    (stage.path / "rollouts" / "late").symlink_to("/etc/hostname")  # after the look at the links
    (stage.path / "wandb").mkdir()
    (stage.path / "wandb" / "debug-core.log").symlink_to("/etc/hostname")  # as W&B makes it
    take_stages(run, taken)
    assert (run.stage("sft").path / "rollouts" / "late").is_symlink() and not (run.stage("sft").path / "wandb").exists()


def test_a_folder_of_runs_and_models_may_be_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then the base's model is no longer where it was; another one that is still there is refused."""
    configs = [tiny_config(tmp_path / name, ("sft", "ppo")) for name in ("base", "arm")]
    base, run = map(write_config, configs)
    finish(base, "sft")
    here, there = tmp_path / "here", tiny_model(tmp_path / "there")
    there.rename(here)
    configs[0].model.hf, configs[1].model.hf = str(there), str(here)
    write_config(configs[0])
    assert len(stages_to_take(run, configs[1], base.path, "ppo")) == 1
    assert f"its model.hf is {there}, here it is {here}; the first is gone" in capsys.readouterr().out


def test_a_run_begins_with_the_stages_of_another(tmp_path: Path) -> None:
    chain = ("sft", "value_pretrain", "ppo")
    configs = [tiny_config(tmp_path / name, chain) for name in ("base", "arm")]
    for config in configs:
        config.value_pretrain.init = "sft"
    base, run = map(write_config, configs)
    with pytest.raises(UserError, match="stage sft is not done there"):
        take_stages(run, stages_to_take(run, config, base.path, "ppo"))
    with pytest.raises(UserError, match="takes the stages before --from STAGE"):
        take_stages(run, stages_to_take(run, config, base.path, None))
    finish(base, "sft")
    finish(base, "value_pretrain")
    finish(base, "ppo")
    take_stages(run, stages_to_take(run, config, base.path, "ppo"))
    take_stages(run, stages_to_take(run, config, base.path, "ppo"))
    assert run.stage("sft").is_done() and run.stage("value_pretrain").is_done() and not run.stage("ppo").path.exists()
    weights = "checkpoints/iter_0000001/weights"
    assert (run.stage("sft").path / weights).samefile(base.stage("sft").path / weights)
    assert not run.stage("sft").metrics.samefile(base.stage("sft").metrics)
    assert not run.stage("sft").rendezvous.exists()
    shutil.rmtree(run.stage("value_pretrain").path)
    take_stages(run, stages_to_take(run, config, base.path, "ppo"))
    run.stage("value_pretrain").manifest.unlink()
    with pytest.raises(UserError, match="was started here"):
        take_stages(run, stages_to_take(run, config, base.path, "ppo"))
    config.model.hf = str(tiny_model(tmp_path / "another"))
    with pytest.raises(UserError, match=r"its model\.hf is"):
        take_stages(run, stages_to_take(run, config, base.path, "ppo"))
