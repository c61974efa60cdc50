"""Defaults ← YAML with includes ← key=value; and that a mistake names file, line and key."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.config.keys import all_keys, nearest_key
from megatron_vcppo.config.load import config_hash, dump_config, load_config
from megatron_vcppo.config.value_sources import CONFIGS, command_line_source, path_override
from megatron_vcppo.errors import UserError

PARTS = ("models", "cluster", "recipes")
"""Folders of files that are included by others, not run by themselves."""
COMPLETE = """
run: {dir: runs/x}
model: {hf: models/x}
sft: {train: data.jsonl}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", COMPLETE)


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as failure:
        load_config(path, overrides)
    return str(failure.value)


SHIPPED = sorted({*CONFIGS.rglob("*.yaml")} - {*(CONFIGS / "experiments").rglob("*.yaml")})
"""Experiments are no configurations: tests/unit/launch/test_experiment_file.py reads them."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_file_loads(path: Path) -> None:
    part = path.relative_to(CONFIGS).parts[0] in PARTS
    config = load_config(path, complete=not part)
    if not part:
        assert dump_config(config)


def test_later_sources_win(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "sft: {steps: 1, epochs: 1, batch_size: 1}")
    write(tmp_path / "parts/b.yml", "sft: {steps: 2, epochs: 2}")
    includes = "defaults: [a, parts/b.yml, models/tiny]\n"
    main = write(tmp_path / "main.yaml", includes + COMPLETE.replace("{train: ", "{steps: 30, train: "))
    config = load_config(main, ["parallel.tp=2", "sft.epochs=5"])
    assert (config.sft.steps, config.sft.epochs, config.sft.batch_size) == (30, 5, 1)
    assert config.model.dtype == "float32"  # configs/models/tiny.yaml, found from anywhere
    assert config.parallel.tp == 2


def test_an_include_may_include_from_its_own_folder(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "sub/inner.yaml", "run: {seed: 7}")
    write(tmp_path / "sub/outer.yaml", "defaults: [inner]")
    base.write_text("defaults: [sub/outer, sub/inner]" + COMPLETE)
    assert load_config(base).run.seed == 7


def test_includes_in_a_cycle_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "defaults: [b]")
    write(tmp_path / "b.yaml", "defaults: [a]")
    assert "a.yaml → b.yaml → a.yaml" in error_of(tmp_path / "a.yaml")


def test_a_missing_include_says_where_it_was_looked_for(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.yaml", "run: {seed: 1}\ndefaults: [models/none]"))
    assert "a.yaml:2: included file models/none.yaml not found in" in message and str(CONFIGS) in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:\n  stepz: 3", "c.yaml:2: unknown key sft.stepz; did you mean sft.steps?"),
        ("sft:\n  lr: 3", "c.yaml:2: unknown key sft.lr; did you mean sft.optimizer.lr?"),
        ("modle: {hf: x}", "c.yaml:1: unknown key modle; did you mean model?"),
        ("qqqqqqq: 1", "unknown key qqqqqqq; top-level keys are run, model,"),
        ("parallel:\n  pp: 1\n  tp: two", "c.yaml:3: parallel.tp must be a whole number in [1, inf), got 'two'"),
        ("parallel: {tp: 1.5}", "c.yaml:1: parallel.tp must be a whole number in [1, inf), got 1.5"),
        ("parallel: {tp: {a: 1}}", "c.yaml:1: parallel.tp must be a whole number in [1, inf), got {'a': 1}"),
        ("parallel: 3", "c.yaml:1: parallel is a section with keys, got 3"),
        ("model: {dtype: fp8}", "c.yaml:1: model.dtype must be bfloat16 | float32, got 'fp8'"),
        ("run: {wandb: yes}", "c.yaml:1: run.wandb must be online | offline | off, got True"),
        ("stages: [sft, ppoo]", "c.yaml:1: stages must be a list of sft | "),
        ("stages: sft", "c.yaml:1: stages must be a list of sft | "),
        ("run: {dir: null}", "c.yaml:1: run.dir must be text, got None"),
        ("sft: {steps: '${nope}'}", "sft.steps: Interpolation key 'nope' not found"),
        ("a: [1", "c.yaml:1: not valid YAML: "),
        ("run: {seed: 1}\nrun: {seed: 2}", "c.yaml:2: not valid YAML: found duplicate key run"),
        ("- 1", "c.yaml:1: expected keys and values at the top level"),
        ("defaults: models/tiny", "c.yaml:1: defaults must be a list of files"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    error = error_of(write(tmp_path / "c.yaml", text))
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.stepz=1", "command line: unknown key sft.stepz; did you mean sft.steps?"),
        ("sft.steps=a", "command line: sft.steps must be a whole number in [1, inf) or null, got 'a'"),
        ("sft.steps", "override 'sft.steps': expected key=value"),
        ("=1", "override '=1': expected key=value"),
        ("[=1", "override '[=1': expected key=value"),
        ("sft.train={a", "override 'sft.train={a': "),
        ("parallel.tp=0", "command line: parallel.tp must be in [1, inf), got 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(base: Path, override: str, message: str) -> None:
    error = error_of(base, override)
    assert message in error
    assert "\n" not in error


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    assert "none.yaml: No such file" in error_of(tmp_path / "none.yaml")
    assert "Is a directory" in error_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in error_of(tmp_path / "binary.yaml")


def test_an_unquoted_off_is_a_word(base: Path) -> None:
    base.write_text(COMPLETE.replace("{dir: runs/x}", "{dir: runs/x, wandb: off}"))
    assert load_config(base).run.wandb == "off"


def test_dictionaries_take_any_key_and_interpolations_are_resolved(base: Path) -> None:
    config = load_config(base, ["cluster.environment.NAME=value", "parallel.tokens_per_microbatch=${model.max_length}"])
    assert config.cluster.environment == {"NAME": "value"}
    assert config.parallel.tokens_per_microbatch == config.model.max_length == 4096


def test_required_keys_count_for_the_stages_that_read_them(base: Path, tmp_path: Path) -> None:
    nothing = write(tmp_path / "nothing.yaml", "")
    message = error_of(nothing)
    assert "3 problems" in message
    assert all(name in message for name in ("run.dir is required", "model.hf is required", "sft.train is required"))
    assert load_config(nothing, complete=False).run.dir == "???"
    base.write_text(COMPLETE.replace("sft: {train: data.jsonl}", ""))
    assert "sft.train is required" in error_of(base)
    evaluated = ["stages=[evaluate]", "prompts.train=x.jsonl", "prompts.test=x.jsonl"]
    assert load_config(base, evaluated).stages == ["evaluate"]


def test_a_dump_loads_as_an_equal_configuration(base: Path, tmp_path: Path) -> None:
    config = load_config(base, ["sft.optimizer.lr=3e-7", "cluster.sbatch.exclusive='true'", "parallel.tp=2"])
    again = load_config(write(tmp_path / "dump.yaml", dump_config(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert config_hash(load_config(base, ["sft.optimizer.lr=4e-7"])) != config_hash(config)


@given(
    name=st.sampled_from(sorted(name for name in all_keys() if len(name) > 8)),
    position=st.integers(0, 30),
    letter=st.sampled_from("aeqx_"),
)
@settings(max_examples=30, deadline=None)
def test_a_slip_of_one_letter_is_recognised(name: str, position: int, letter: str) -> None:
    section, _, last = name.rpartition(".")
    position %= len(last) + 1
    slip = f"{section}.{last[:position]}{letter}{last[position:]}"
    near = nearest_key(slip)
    assert near is not None
    assert near.split(".")[0] == name.split(".")[0] or near.rpartition(".")[2] == last


@pytest.mark.parametrize("name", ["a b", "a #b", "a: b", "a\nb", "'x'", 'a"b', "[a]", "1", "ä", "a\\nb", "{x}"])
def test_a_path_that_a_command_gives_is_taken_as_it_is(name: str) -> None:
    """Sweeps and experiments name the folders of their runs."""
    assert command_line_source([path_override("run.dir", Path(name))]).values.run.dir == name
