"""Tokens that a model has no rows for are refused; responses end where the exported model stops."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.data.sft_dataset import load_sft_dataset
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.data.vocabulary import (
    check_vocabulary,
    complete_generation_config,
    read_vocabulary,
    stop_ids,
)
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.tasks.base_model import write_base_model
from megatron_vcppo.tasks.word_tokenizer import EOS, WORDS, build_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chat model whose turns end with <|im_end|>: the tokenizer's EOS, but not what generation_config.json names."""
    folder = tmp_path / "model"
    write_base_model(folder)
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "back"  # an ordinary word of the tasks plays the end of a turn
    tokenizer.save_pretrained(folder)
    return folder


def add_tokens(folder: Path, count: int, rows: int) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new_{i}>" for i in range(count)])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))


def test_more_tokens_than_rows_are_refused_wherever_they_meet(model: Path, tmp_path: Path, capsys) -> None:
    add_tokens(model, 2, len(WORDS) + 1)
    wanted = rf"tokens without a row in the embedding .*: '<new_1>' \({len(WORDS) + 1}\); resize"
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "3 ?", "response": "7"}))
    for meets in (check_vocabulary, load_tokenizer, lambda folder: import_hf(folder, tmp_path / "out", 1, 1)):
        with pytest.raises(UserError, match=wanted):
            meets(model)
    config = tmp_path / "c.yaml"
    values = {"run": {"dir": str(tmp_path / "run")}, "model": {"hf": str(model)}, "sft": {"train": str(data)}}
    config.write_text(json.dumps(values | {"stages": ["sft"]}))
    assert vcppo(["run", str(config)]) == 2 and "without a row in the embedding" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_added_tokens_that_fit_are_named(model: Path) -> None:
    assert check_vocabulary(model) == ""
    add_tokens(model, 2, len(WORDS) + 2)
    assert "2 tokens were added to the tokenizer's vocabulary (<new_0>, <new_1>)" in check_vocabulary(model)
    assert load_tokenizer(model).convert_tokens_to_ids("<new_1>") == len(WORDS) + 1


def test_an_export_stops_where_responses_ended_in_training(model: Path, tmp_path: Path) -> None:
    turn_end, text_end = WORDS.index("back"), WORDS.index(EOS)
    assert read_vocabulary(model).eos_id == turn_end and stop_ids(model) == [text_end, turn_end]
    from vllm import SamplingParams  # slow to import

    engine = SamplingParams()
    given = json.loads((model / "generation_config.json").read_text())
    engine.update_from_generation_config(given, load_tokenizer(model).eos_token_id)
    assert engine.all_stop_token_ids == set(stop_ids(model))

    import_hf(model, tmp_path / "checkpoint", 1, 1)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify_logits=False)
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert exported == given | {"eos_token_id": [text_end, turn_end]}

    source = tmp_path / "s.jsonl"
    source.write_text("".join(json.dumps({"prompt": "3 ?", "response": r}) + "\n" for r in ("7", "7 back", f"7 {EOS}")))
    dataset, _ = load_sft_dataset(str(source), load_tokenizer(model), 50, stops=stop_ids(model))
    assert [dataset[i].token_ids[-2:] for i in range(3)] == [
        (WORDS.index("7"), end) for end in (turn_end, turn_end, text_end)
    ]
    assert all(dataset[i].fields["loss_mask"][-1] for i in range(3))


def test_what_already_agrees_is_left_as_it_is(tmp_path: Path) -> None:
    write_base_model(tmp_path / "model")
    before = (tmp_path / "model" / "generation_config.json").read_bytes()
    complete_generation_config(tmp_path / "model")
    assert (tmp_path / "model" / "generation_config.json").read_bytes() == before
    (tmp_path / "model" / "generation_config.json").unlink()
    complete_generation_config(tmp_path / "model")
    assert not (tmp_path / "model" / "generation_config.json").exists(), "config.json says the same"
