"""What a user can get wrong, by kind: each costs one line that says what and where, exit code 2, and leaves nothing."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_vcppo.cli import main
from megatron_vcppo.commands.arguments import prepare
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.data.vocabulary import stop_ids
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.safetensors_files import read_folder
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import Follower, printable
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.run.rollout_store import read_rollouts, write_rollouts
from tests.helpers.recorded_run import record_run
from tools.benchmarks._tiny_chains import tiny_model


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """SFT and export on this machine."""
    (tmp_path / "data.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}/run}}\nmodel: {{hf: {tiny_model(tmp_path / 'model')}, max_length: 64}}\n"
        f"sft: {{train: {tmp_path}/data.jsonl}}\nstages: [sft, export]\ncluster: {{name: local}}\n"
    )
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse: usage, then the line
        code = exit_.code if isinstance(exit_.code, int) else 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("usage:", " "))]
    assert code == 2 and len(lines) == 1, (code, lines)
    return lines[0]


@pytest.mark.parametrize("command", [["config"], ["run"], ["submit", "--dry-run"]], ids=" ".join)
def test_configurations(command: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*overrides: str) -> str:
        return refused(capsys, command[0], recipe, *command[1:], *overrides)

    assert re.search(r"run\.seed must be .*\[0, 4294967296\)", line(f"run.seed={2**64}"))
    assert "export has no actor to export: put it behind sft or ppo" in line("stages=[export,sft]")
    assert "nested too deeply" in line("sft.mix=" + "{a: " * 900 + "1" + "}" * 900)
    deep = tmp_path / "deep.yaml"
    deep.write_text("sft: " + "[" * 900 + "]" * 900)
    assert line_of(deep, command, capsys).endswith("nested too deeply")
    if command != ["config"]:
        assert "model.max_length 8192 is more than the model's" in line("model.max_length=8192")
        assert "--only names one stage" in line("--only", "sft", "--from", "sft")
    assert not (tmp_path / "run").exists()


def line_of(config: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    return refused(capsys, command[0], config, *command[1:])


def test_words_on_the_command_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --worst: -3 is less than 1" in refused(capsys, "rollouts", recipe.parent, "--worst", "-3")
    assert refused(capsys, "config", "--explain", "zzz").endswith("vcppo config --explain lists all")


MODELS: dict[str, dict[str, object]] = {
    "head_dim 'x' is not a positive integer": {"head_dim": "x"},
    "num_key_value_heads '2' is not a positive integer": {"num_key_value_heads": "2"},
    "rope_theta 'big' is not a positive number": {"rope_theta": "big", "rope_parameters": None},
    "rms_norm_eps nan is not a positive number": {"rms_norm_eps": float("nan")},
    "rms_norm_eps 'small' is not a positive number": {"rms_norm_eps": "small"},
    "rope_scaling [1] is not an object": {"rope_scaling": [1]},
    "rope_parameters 'default' is not an object": {"rope_parameters": "default"},
    "factor [8] is not a positive number": {"rope_scaling": {"type": "llama3", "factor": [8]}, "rope_parameters": None},
    "larger than any model: num_layers 1000000000": {"num_hidden_layers": 10**9},
    "layer_types 3 is not a list": {"layer_types": 3},
}


@pytest.mark.parametrize("message", MODELS)
def test_model_folders(message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | MODELS[message]))
    line = refused(capsys, "run", recipe)
    assert line.startswith(f"vcppo: error: {file}: ") and message in line
    assert not (tmp_path / "run").exists()


TOKENIZERS: dict[str, tuple[str, object]] = {
    "malformed tokenizer files": ("tokenizer.json", {"model": {"vocab": {"a": "first"}}}),
    "malformed tokenizer files: TypeError": ("tokenizer.json", {"added_tokens": ["x"]}),
    "malformed tokenizer files: ValueError": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"x": {"content": ""}}},
    ),
    "malformed tokenizer files: AttributeError": ("tokenizer.json", {"model": [1]}),
}


@pytest.mark.parametrize("message", TOKENIZERS)
def test_tokenizers(message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content = TOKENIZERS[message]
    (tmp_path / "model" / name).write_text(json.dumps(content))
    assert message in refused(capsys, "run", recipe)
    (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(UserError, match=r"eos_token_id \['x'\] is neither"):
        stop_ids(tmp_path / "model")


def test_null_in_a_model_folder_means_the_default(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    wanted = Architecture.from_config(config | {"rms_norm_eps": 1e-6})
    nothing = {"rms_norm_eps": None, "num_key_value_heads": None, "head_dim": None}
    found = Architecture.from_config(config | nothing)
    assert found.norm_eps == wanted.norm_eps and found.num_kv_heads == found.num_heads
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        Architecture.from_hf(tmp_path / "model")


@pytest.fixture
def run(recipe: Path) -> RunFolder:
    """A run that was not started."""
    folder, config = prepare(recipe, [])
    folder.path.mkdir()
    folder.config.write_text(dump_config(config))
    return folder


def test_events_that_are_none_do_not_count(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"event": "attempt", "time": 1.0, "stage": "sft"}
    bad: list[object] = [
        {},
        {"event": "submitted", "time": 1},
        {"event": 3, "time": 1},
        {"event": "x", "time": "y"},
        [1],
        7,
    ]
    bad += [{"event": "attempt_end", "time": 2, "stage": "sft", "code": "x"}]
    text = "\n".join(map(json.dumps, [*bad, good])) + "\n" + "[" * 100_000 + "\n"
    run.events.write_text(text)
    assert events.read(run.path) == [good]
    assert main(["status", str(run.path)]) == 1, "an attempt that did not end"
    capsys.readouterr()
    assert "no attempt of any stage has started" in refused(capsys, "logs", run.path)


def test_names_that_are_no_attempts_or_checkpoints_do_not_count(run: RunFolder) -> None:
    stage = run.stage("sft")
    for name in ("attempt_x", "attempt_", "attempt_2", "attempt_10"):
        (stage.logs / name).mkdir(parents=True)
    for name in ("iter_abc", "iter_", "iter_" + "9" * 50):
        (stage.checkpoints / name).mkdir(parents=True)
        (stage.checkpoints / name / "manifest.json").touch()
    assert [path.name for path in stage.attempts()] == ["attempt_2", "attempt_10"]
    assert stage.next_attempt().name == "attempt_11" and stage.checkpoint_iteration() is None
    assert main(["status", str(run.path)]) == 0


@pytest.mark.parametrize("name", ["events.jsonl", ".lock", "sft", "config.yaml"])
def test_files_and_folders_of_the_wrong_kind(
    name: str, run: RunFolder, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.path / name
    path.unlink(missing_ok=True)
    path.touch() if name == "sft" else path.mkdir()
    line = refused(capsys, "run", recipe)
    assert str(path) in line, line


def test_damaged_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.of(record_run(tmp_path / "run", collapsing=False, iterations=3, num_rollouts=4))
    out = tmp_path / "report.html"
    assert main(["report", str(run.path), "--out", str(out)]) == 0
    run.stage("ppo").profiles.write_text('{"iteration": 1, "advantage_by_position": ["<script>", {}]}\n')
    metrics = run.stage("ppo").metrics
    lengths = re.sub(r'("rollout/length_mean": )[0-9.]+', r"\g<1>1e308", metrics.read_text(), count=1)
    assert "1e308" in lengths
    metrics.write_text(lengths)
    run.stage("ppo").rollouts.mkdir(parents=True, exist_ok=True)
    for name in ("iter_0000001_0of1.jsonl.zst", "iter_0000002_0of1.jsonl.zst"):
        (run.stage("ppo").rollouts / name).write_bytes(b"not compressed")
    capsys.readouterr()
    assert main(["report", str(run.path), "--out", str(out)]) == 0 and "<script>" not in out.read_text()
    capsys.readouterr()
    assert "iter_0000002_0of1.jsonl.zst: cannot be decompressed: " in refused(
        capsys, "rollouts", run.path, "--iteration", 2
    )
    good = {"name": "x", "avg": 0.5, "avg_interval": 0.1, "length_mean": 9.0, "truncated_share": 0.0}
    run.stage("evaluate").make().results.write_text(json.dumps([good]))
    assert main(["report", str(run.path), "--out", str(out)]) == 0
    bad: list[dict[str, object]] = [
        {"avg": 10**400},
        {"avg": True},
        {"pass": {"x": [0.1]}},
        {"pass": ["a"]},
        {"tasks": [1]},
        {"avg_range": 3},
    ]
    texts = ["{", "{}", '[{"name": "x"}]', "[" * 100_000, *(json.dumps([good | one]) for one in bad)]
    for text in texts:
        run.stage("evaluate").make().results.write_text(text)
        assert str(run.stage("evaluate").results) in refused(capsys, "report", run.path, "--out", out)


def changed_record(**values: object) -> Callable[[dict[str, np.ndarray]], dict[str, object]]:
    """Other values in the record of the first rollout; ``prompt_text`` is its prompt's."""

    def change(arrays: dict[str, np.ndarray]) -> dict[str, object]:
        first, *others = arrays["records"].tobytes().decode().splitlines()
        record = json.loads(first)
        if "prompt_text" in values:
            record["prompt"]["text"] = values["prompt_text"]
        lines = [json.dumps(record | values), *others]
        return {"records": np.frombuffer("".join(f"{line}\n" for line in lines).encode(), np.uint8)}

    return change


def negative_lengths(arrays: dict[str, np.ndarray]) -> dict[str, object]:
    lengths = arrays["response_lengths"].copy()
    lengths[:2] = -1, lengths[:2].sum() + 1
    return {"response_lengths": lengths}


DAMAGED_ROLLOUTS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, object]]] = {
    "Expected `float | null`, got `str` - at `$.reward`": changed_record(reward="abc"),
    "Expected `str`, got `int` - at `$.response_text`": changed_record(response_text=5),
    "Expected `float | null`, got `str` - at `$.model_score`": changed_record(model_score="x"),
    "at `$.observations[0][0]`": changed_record(observations=[["a", "b"]]),
    "Expected `str`, got `object` - at `$.prompt.text`": changed_record(prompt_text={}),
    "at `$.policy_version`": changed_record(policy_version={}),
    "Number out of range": changed_record(reward=10**400),
    "cannot convert float infinity": lambda arrays: {"schema": np.float64("inf")},
    "response_lengths do not fit": negative_lengths,
    "places is int64 [1, 4], not int64 [n]": lambda arrays: {"places": arrays["places"][None]},
    "response_ids is float64": lambda arrays: {"response_ids": arrays["response_ids"].astype(float)},
    "1 records of 4 rollouts": lambda arrays: {"records": np.frombuffer(b"{}\n", np.uint8)},
    "log-probs of": lambda arrays: {"rollout_logprobs": arrays["rollout_logprobs"][1:]},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run with four rollouts of one iteration, and their file."""
    run = RunFolder.of(record_run(tmp_path_factory.mktemp("stored") / "run", collapsing=False, iterations=1))
    shutil.rmtree(run.stage("ppo").rollouts, ignore_errors=True)
    prompt = Prompt("p:1", (1, 2), "1 + 1", "2", "math")
    rollouts = [Rollout(prompt, i, i, (3, 4), "2", (-0.5, -0.1), "stop", 0, reward=1.0) for i in range(4)]
    return run, write_rollouts(run.stage("ppo").rollouts, 1, RolloutPart.whole(rollouts))


def refused_rollouts(run: RunFolder, file: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    """With which line ``vcppo rollouts`` refuses such a file; the report leaves it out."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        line = refused(capsys, "rollouts", run.path)
        assert main(["report", str(run.path), "--out", str(run.path / "report.html")]) == 0
    finally:
        file.write_bytes(before)
    assert line.startswith(f"vcppo: error: {file}: damaged: "), line
    return line


@pytest.mark.parametrize("message", DAMAGED_ROLLOUTS)
def test_damaged_rollouts(message: str, stored: tuple[RunFolder, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, file = stored
    with np.load(file) as content:
        arrays = dict(content)
    changed = io.BytesIO()
    np.savez(changed, **(arrays | DAMAGED_ROLLOUTS[message](arrays)))
    assert message in refused_rollouts(run, file, changed.getvalue(), capsys)


def test_arrays_larger_than_their_file(stored: tuple[RunFolder, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, file = stored
    huge, packed, header = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(huge, "w") as new:
        for name in old.namelist():
            new.writestr(name, header.getvalue() if name == "places.npy" else old.read(name))
    refused_rollouts(run, file, huge.getvalue(), capsys)
    np.savez_compressed(packed, schema=np.int64(2), places=np.zeros(1 << 20, np.int64))
    assert "it is compressed" in refused_rollouts(run, file, packed.getvalue(), capsys)


def test_a_small_file_of_rollouts_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Those of runs before schema 2."""
    path = tmp_path / "iter_0000001_0of1.jsonl.zst"
    with zstandard.open(path, "wb") as file:
        for _ in range(300):
            file.write(b"0" * (1 << 20))
    with pytest.raises(UserError, match="1: a line of more than 64 MiB"):
        read_rollouts(tmp_path, 1)


def test_files_without_rollouts(stored: tuple[RunFolder, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, file = stored
    write_rollouts(file.parent, 2, RolloutPart())
    assert "iteration 2 has no rollouts" in refused(capsys, "rollouts", run.path)
    assert main(["report", str(run.path), "--out", str(run.path / "report.html")]) == 0


HEADERS: dict[str, str] = {
    "has dtype []": '{"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}',
    "has dtype {}": '{"a": {"dtype": {}, "shape": [2], "data_offsets": [0, 8]}}',
    "the shape or place of tensor a": '{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
    "the shape or place of tensor b": (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        f' "b": {{"dtype": "F32", "shape": [0, {2**62}, {2**62}], "data_offsets": [8, 8]}}}}'
    ),
    "a name is there twice": '{"a": 1, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "tensor b begins at byte 4, not at 8": (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        ' "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    ),
    "tensor a begins at byte 4, not at 0": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
}


@pytest.mark.parametrize("message", HEADERS)
def test_headers_of_safetensors(message: str, tmp_path: Path) -> None:
    header = HEADERS[message].encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=re.escape(message)):
        read_folder(tmp_path)


def test_pipes_in_a_model_folder_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    for read in (Architecture.from_hf, read_folder):
        with pytest.raises(UserError, match="a pipe or a device"):
            read(tmp_path)


def test_control_characters_are_shown_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.of(record_run(tmp_path / "run", collapsing=False, iterations=3, num_rollouts=4))
    bad = "\x1b[2J\x07\x9b31m\r\u202egnp\x00"
    prompt = Prompt("p:1", (1,), f"prompt {bad}", f"answer {bad}", "math")
    rollout = Rollout(prompt, 0, 0, (3,), f"text {bad}\tnext\nline", (-0.5,), "stop", 0, reward=-1.0, verdict="wrong")
    shutil.rmtree(run.stage("ppo").rollouts, ignore_errors=True)
    write_rollouts(run.stage("ppo").rollouts, 1, RolloutPart.whole([rollout]))
    assert main(["rollouts", str(run.path)]) == 0
    assert main(["report", str(run.path), "--out", str(tmp_path / "report.html")]) == 0
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in (shown, page):
        assert r"\x1b[2J\x07\x9b31m" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    (tmp_path / "trainer_0.log").write_text(f"a\r\nb {bad}\n")
    Follower(tmp_path / "trainer_0.log").close()
    assert "a\nb \\x1b[2J" in capsys.readouterr().out
    assert "\x1b" not in refused(capsys, "config", tmp_path / "\x1b[2J.yaml")
    assert printable("tab\tline\n½ 数 😀 é a\u200db\u200c") == "tab\tline\n½ 数 😀 é a\u200db\u200c"
    assert printable("\u061c\u200b\ufeff\U000e0041\xad\u2028") == r"\u061c\u200b\ufeff\U000e0041\xad\u2028"


def test_the_names_of_logs_are_shown_not_obeyed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    moved = run.path.rename(run.path.with_name("a\x1b[2J"))
    for stage in ("sft", "export"):
        (moved / stage / "logs" / "attempt_1").mkdir(parents=True)
        (moved / stage / "logs" / "attempt_1" / "trainer_0.log").write_text("a line\n")
        write_manifest(moved / stage, {})
    assert main(["logs", str(moved), "-f"]) == 0
    assert main(["status", str(moved), "--watch"]) == 0
    shown = capsys.readouterr().out
    assert "==> " in shown and "\x1b" not in shown and shown.count(r"a\x1b[2J") == 2


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: both are refused in the middle of a write."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from megatron_vcppo.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "task"
    command = [sys.executable, "-c", program, "make-task", "--out", str(out), "--task", "running_sum"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert found.returncode == 2, found.stderr
    assert re.fullmatch(r"vcppo: error: .*: File too large: make room.*\n", found.stderr), found.stderr
    assert list(tmp_path.iterdir()) == []
