"""A run that was made before a key existed continues as it was; new runs get the key's default."""

from pathlib import Path

import yaml

from megatron_vcppo.commands.arguments import prepare
from megatron_vcppo.config.keys import BEFORE, all_keys
from megatron_vcppo.config.load import load_config
from megatron_vcppo.run.config_file import open_run, write_config
from megatron_vcppo.run.folder import RunFolder

KEY = "prompts.apply_chat_template"


def written(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    sections = {"run": {"dir": str(tmp_path / "run")}, "model": {"hf": "x"}, "sft": {"train": "x.jsonl"}}
    file.write_text(yaml.safe_dump({**sections, "stages": ["sft"]}))
    return file


def store(file: Path, remove: bool) -> RunFolder:
    config = load_config(file)
    run = RunFolder.of(config)
    run.make()
    write_config(run, config)
    if remove:
        values = yaml.safe_load(run.config.read_text())
        del values["prompts"]["apply_chat_template"]
        run.config.write_text(yaml.safe_dump(values))
    return run


def test_the_table_names_keys_whose_default_is_another() -> None:
    assert all(all_keys()[name].default != value for name, value in BEFORE.items())


def test_an_older_run_continues_as_it_was_however_it_is_resumed(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert load_config(file).prompts.apply_chat_template
    run = store(file, remove=True)
    assert not open_run(run.path)[1].prompts.apply_chat_template
    _, config = prepare(file, [])
    assert not config.prompts.apply_chat_template
    write_config(run, config)
    assert not prepare(file, [])[1].prompts.apply_chat_template, "also when the key is stored by now"
    assert prepare(file, [f"{KEY}=true"])[1].prompts.apply_chat_template


def test_a_new_run_and_its_resume_have_the_default(tmp_path: Path) -> None:
    file = written(tmp_path)
    run = store(file, remove=False)
    assert prepare(file, [])[1].prompts.apply_chat_template and open_run(run.path)[1].prompts.apply_chat_template
