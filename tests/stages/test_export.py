"""The export stage: what it writes, and that an attempt which was killed is in nobody's way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.manifest import verify_manifest, write_manifest
from megatron_vcppo.stages import export
from tools.benchmarks._tiny_models import save_tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run whose SFT is done."""
    hf = save_tiny_model(tmp_path / "base")
    iteration = tmp_path / "run" / "sft" / "checkpoints" / "iter_0000003"
    import_hf(hf, iteration / "actor", 2, 1)
    write_manifest(iteration, {"iteration": 3})
    StageFolder(tmp_path / "run" / "sft").mark_done(checkpoint=iteration)
    config = Config()
    config.run.dir, config.model.hf, config.stages = str(tmp_path / "run"), str(hf), ["sft", "export"]
    config.export.verify_logits = False
    return config


def test_a_killed_attempt_leaves_nothing_behind(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export"
    for name in (".hf.partial-77", "hf"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    export.run(config)
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "manifest.json"]
    verify_manifest(folder)
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", folder / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["best", "iter_2", "iter_0000002"])
def test_a_checkpoint_is_exported_by_its_name(config: Config, tmp_path: Path, name: str) -> None:
    stage = StageFolder(tmp_path / "run" / "sft")
    best = stage.kept_checkpoint(2)
    import_hf(save_tiny_model(tmp_path / "better", seed=5), best / "actor", 1, 1)
    write_manifest(best, {"iteration": 2})
    stage.best.symlink_to(best.name)
    config.export.checkpoint = name
    export.run(config)
    better, ours = (load_file(path / "model.safetensors") for path in (tmp_path / "better", tmp_path / "run/export/hf"))
    assert better.keys() == ours.keys() and all(torch.equal(better[key], ours[key]) for key in better)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(config: Config) -> None:
    for name in ("best", "iter_4"):
        config.export.checkpoint = name
        with pytest.raises(UserError, match=f"sft: no checkpoint {name}; there are: iter_0000003"):
            export.run(config)


def test_a_folder_of_the_users_is_not_overwritten(config: Config, tmp_path: Path) -> None:
    config.export.out = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(UserError, match="mine: exists already"):
        export.run(config)
    assert not (tmp_path / "run" / "export" / "manifest.json").exists()
    (tmp_path / "mine" / "notes").unlink()
    export.run(config)
    assert (tmp_path / "mine" / "model.safetensors").exists()
    verify_manifest(tmp_path / "run" / "export")


def test_a_missing_critic_is_said_before_the_actor_is_written(config: Config, tmp_path: Path) -> None:
    """Else the actor's folder, outside of the run, would stop the next attempt."""
    config.export.critic, config.export.out = True, str(tmp_path / "mine")
    with pytest.raises(UserError, match=r"export\.critic: no finished stage of this run has a critic"):
        export.run(config)
    assert not (tmp_path / "mine").exists()


def test_other_ranks_do_nothing_and_a_chain_without_actor_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.stages = ["export"]
    monkeypatch.setenv("RANK", "1")
    export.run(config)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="no stage before it in this chain trains an actor"):
        export.run(config)
    assert not (tmp_path / "run" / "export" / "manifest.json").exists()
