"""What a user can get wrong, by kind: each costs one line that says what and where, exit code 2, and leaves nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.commands.arguments import prepare
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.data.vocabulary import stop_ids
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import Follower, printable
from megatron_vcppo.run.rollout_store import write_rollouts
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
    run.stage("ppo").rollouts.mkdir(parents=True, exist_ok=True)
    for name in ("iter_0000001_0of1.jsonl.zst", "iter_0000002_0of1.jsonl.zst"):
        (run.stage("ppo").rollouts / name).write_bytes(b"not compressed")
    capsys.readouterr()
    assert main(["report", str(run.path), "--out", str(out)]) == 0 and "<script>" not in out.read_text()
    capsys.readouterr()
    assert "iter_0000002_0of1.jsonl.zst: cannot be decompressed: " in refused(
        capsys, "rollouts", run.path, "--iteration", 2
    )
    for text in ("{", "{}", '[{"name": "x"}]', '[{"name": "x", "avg": "1"}]', "[" * 100_000):
        run.stage("evaluate").make().results.write_text(text)
        assert str(run.stage("evaluate").results) in refused(capsys, "report", run.path, "--out", out)


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
    assert printable("tab\tline\n½ 数 😀 é") == "tab\tline\n½ 数 😀 é"


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
