"""The SFT stage on real gloo ranks: it learns, logs, names bad data; a resume is bit-equal wherever it was ended."""

import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.config import Config, KeepBestConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.errors import SAVED
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.mcore.checkpoint import complete_checkpoints
from megatron_vcppo.run.manifest import verify_manifest
from megatron_vcppo.run.metrics_log import MetricsLog, read_metrics
from megatron_vcppo.stages.__main__ import main as run_rank
from tests.helpers.distributed import RanksFailed, run_distributed_test
from tools.benchmarks._tiny_chains import wait_until, write_config

SAMPLES, BATCH_SIZE, EPOCHS = 36, 8, 3
STEPS = math.ceil(EPOCHS * SAMPLES / BATCH_SIZE)
EPOCH_BORDER = 9
"""Two epochs of 36 samples are nine batches of 8; the first epoch ends inside a batch."""
DP2 = ParallelConfig(dp=2, distributed_optimizer=True)
PP2 = ParallelConfig(pp=2)
CP2 = ParallelConfig(cp=2)
TP2PP2 = ParallelConfig(tp=2, pp=2, sequence_parallel=True)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "task"
    sizes = ["--demonstrations", str(SAMPLES), "--validation", "8", "--prompts", "1", "--test", "1"]
    assert vcppo(["make-task", "--out", str(folder), *sizes]) == 0
    return folder


def make_config(task: Path, run: Path, parallel: ParallelConfig) -> Config:
    config = Config()
    config.run.dir, config.run.timeout_s = str(run), 60.0
    config.model.hf, config.model.dtype, config.model.max_length = str(task / "base_model"), "float32", 512
    config.parallel = replace(parallel, tokens_per_microbatch=512)
    config.sft.train, config.sft.validation = str(task / "sft_train.jsonl"), str(task / "sft_validation.jsonl")
    config.sft.batch_size, config.sft.epochs, config.sft.validate_every = BATCH_SIZE, EPOCHS, 5
    config.sft.optimizer.lr = 4e-3
    config.sft.schedule = ScheduleConfig(kind="cosine", warmup_steps=2, min_lr_ratio=0.1)
    config.sft.checkpoint.save_every = 4
    # The first validation has the highest loss: as if the run had peaked there.
    config.sft.checkpoint.keep_best = KeepBestConfig("sft/validation_loss", count=1, mode="max")
    return config


def run_stage(config: Config, before: Callable[[], None] = lambda: None) -> list[int]:
    """What ``python -m megatron_vcppo.stages sft`` runs, on forked ranks; their exit codes."""
    path = write_config(config).config

    def rank() -> int:
        sys.argv[1:] = ["sft", "--config", str(path)]
        before()
        return run_rank()

    parallel = config.parallel
    return run_distributed_test(rank, parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1))


def at_log_of(step: int, number: int) -> None:
    """Send this process a signal when it has logged the step, before a checkpoint of that step."""
    log = MetricsLog.log

    def log_and_signal(self: MetricsLog, iteration: int, metrics: Mapping[str, float | int | str]) -> None:
        log(self, iteration, metrics)
        if iteration == step:
            os.kill(os.getpid(), number)

    MetricsLog.log = log_and_signal  # type: ignore[method-assign]


def kill_rank_after(victim: int, seconds: float) -> None:
    if int(os.environ["RANK"]) == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def weights(config: Config, out: Path) -> dict[str, torch.Tensor]:
    """The final checkpoint's, under their Hugging Face names."""
    stage = Path(config.run.dir) / "sft"
    checkpoint = stage / json.loads((stage / "manifest.json").read_text())["meta"]["checkpoint"]
    export_hf(checkpoint, out, verify_logits=False)
    return load_file(out / "model.safetensors")


def learned(config: Config) -> list[dict]:
    """The log without what is measured by a clock."""
    records = read_metrics(Path(config.run.dir) / "sft")
    clock = ("timestamp", "time/", "stopping/", "speed/tokens_per", "speed/mfu", "speed/peak", "sft/tokens_per_s")
    return [{name: value for name, value in record.items() if not name.startswith(clock)} for record in records]


class Through:
    """A run that nothing ended: what every resumed run must equal."""

    def __init__(self, task: Path, folder: Path, parallel: ParallelConfig) -> None:
        self.task, self.parallel, self.folder = task, parallel, folder
        self.config = make_config(task, folder / "through", parallel)
        started = time.monotonic()
        codes = run_stage(self.config)
        self.seconds = time.monotonic() - started
        assert set(codes) == {0}
        self.weights, self.log = weights(self.config, folder / "through_hf"), learned(self.config)

    def assert_equal(self, config: Config, out: Path) -> None:
        ours = weights(config, out)
        assert ours.keys() == self.weights.keys()
        different = [name for name, tensor in self.weights.items() if not torch.equal(tensor, ours[name])]
        assert not different, f"not bit-equal: {different}"
        assert learned(config) == self.log
        kept = Path(config.run.dir) / "sft" / "kept"
        assert {path.name: path.resolve().name for path in kept.iterdir()} == dict.fromkeys(
            ("iter_0000005", "best"), "iter_0000005"
        )
        verify_manifest(kept / "best")

    def kill_and_resume(self, seed: int, folder: Path, kills: int) -> list[int]:
        """Kill a random rank at a random moment, ``kills`` times; returns the steps from which the attempts began."""
        chance = random.Random(seed)
        config = make_config(self.task, folder / "run", self.parallel)
        config.sft.checkpoint.save_every, config.sft.checkpoint.async_save = chance.randint(1, 4), bool(seed % 2)
        ranks = self.parallel.tp * self.parallel.pp * (self.parallel.dp or 1)
        begun_from = []
        for kills_left in range(kills, -1, -1):
            found = sorted(complete_checkpoints(folder / "run" / "sft" / "checkpoints"))
            begun_from.append(int(found[-1].name[5:]) if found else 0)
            kill = partial(kill_rank_after, chance.randrange(ranks), chance.uniform(0.1, 1.0) * self.seconds)
            with contextlib.suppress(RanksFailed) if kills_left else contextlib.nullcontext():
                assert set(run_stage(config, kill if kills_left else lambda: None)) == {0}
                break
        self.assert_equal(config, folder / "hf")
        return begun_from


@pytest.fixture(scope="module")
def through(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Through:
    return Through(task, tmp_path_factory.mktemp("dp2"), DP2)


def test_it_learns_and_logs_every_step(through: Through) -> None:
    records = read_metrics(Path(through.config.run.dir) / "sft")
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["sft/loss"] < 0.75 * records[0]["sft/loss"]
    validated = {r["iteration"]: r["sft/validation_loss"] for r in records if "sft/validation_loss" in r}
    assert list(validated) == [5, 10, STEPS] and validated[STEPS] < validated[5]
    for record in records:
        assert record["total_iterations"] == STEPS
        assert record["sft/epoch"] == pytest.approx(record["iteration"] * BATCH_SIZE / SAMPLES)
        assert all(record[name] > 0 for name in ("sft/grad_norm", "sft/tokens_per_s", "time/step_s", "sft/entropy"))
        assert record["speed/model_tflop"] > 0 and record["speed/mfu"] > 0
    rates = [record["sft/learning_rate"] for record in records]
    assert rates[:2] == pytest.approx([2e-3, 4e-3]) and rates[-1] == pytest.approx(4e-4)
    kept = sorted(path.name for path in complete_checkpoints(Path(through.config.run.dir) / "sft" / "checkpoints"))
    assert kept == ["iter_0000012", f"iter_{STEPS:07d}"]
    best = sorted(path.name for path in (Path(through.config.run.dir) / "sft" / "kept").iterdir())
    assert best == ["best", "iter_0000005"], "it outlives the checkpoints of its time"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_at_an_epoch_border_it_resumes_bit_equal(through: Through, tmp_path: Path, number: int) -> None:
    config = make_config(through.task, tmp_path / "run", DP2)

    def end_rank_zero() -> None:
        if os.environ["RANK"] == "0":
            at_log_of(EPOCH_BORDER, number)

    checkpoints = tmp_path / "run" / "sft" / "checkpoints"
    if number == signal.SIGKILL:
        with pytest.raises(RanksFailed, match="rank 0: exit code -9"):
            run_stage(config, end_rank_zero)
        assert max(complete_checkpoints(checkpoints)).name == "iter_0000008"
    else:
        assert run_stage(config, end_rank_zero) == [SAVED, SAVED]
        assert max(complete_checkpoints(checkpoints)).name == f"iter_{EPOCH_BORDER:07d}"
    assert not (tmp_path / "run" / "sft" / "manifest.json").exists()
    assert run_stage(config) == [0, 0]
    through.assert_equal(config, tmp_path / "hf")


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_resumes_bit_equal(through: Through, tmp_path: Path, seed: int) -> None:
    through.kill_and_resume(seed, tmp_path, kills=1)


@pytest.fixture(scope="module")
def through_pipeline(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Through:
    return Through(task, tmp_path_factory.mktemp("tp2pp2"), TP2PP2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_seed", [100, 105, 110, 115])
def test_ten_random_kills_under_two_layouts(
    through: Through, through_pipeline: Through, tmp_path: Path, first_seed: int
) -> None:
    begun_from = []
    for seed in range(first_seed, first_seed + 5):
        uninterrupted = through_pipeline if seed % 4 == 0 else through
        begun_from += uninterrupted.kill_and_resume(seed, tmp_path / str(seed), kills=2)[1:]
    assert len(begun_from) >= 3 and len(set(begun_from)) >= 2, f"kills hit too little: {begun_from}"


def test_it_resumes_under_another_layout(through: Through, tmp_path: Path) -> None:
    config = make_config(through.task, tmp_path / "run", TP2PP2)

    def end_rank_zero() -> None:
        if os.environ["RANK"] == "0":
            at_log_of(6, signal.SIGUSR2)

    assert run_stage(config, end_rank_zero) == [SAVED] * 4
    config.parallel = replace(PP2, tokens_per_microbatch=512)
    assert run_stage(config) == [0, 0]
    for ours, theirs in zip(learned(config), through.log, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3), f"{name} of step {theirs['iteration']}"


def test_it_learns_the_same_with_sequences_shared_by_two_ranks(through: Through, tmp_path: Path) -> None:
    config = make_config(through.task, tmp_path / "run", CP2)
    assert run_stage(config) == [0, 0]
    for ours, theirs in zip(learned(config), through.log, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3), f"{name} of step {theirs['iteration']}"


def run_alone(config: Config, log: Path) -> tuple[int, str]:
    """One rank's exit code and output."""

    def redirect() -> None:
        sys.stdout = sys.stderr = log.open("w", buffering=1)

    return run_stage(config, redirect)[0], log.read_text()


def test_steps_that_were_lowered_below_the_newest_checkpoint_are_done(task: Path, tmp_path: Path) -> None:
    config = make_config(task, tmp_path / "run", ParallelConfig())
    config.sft.epochs, config.sft.schedule.warmup_steps, config.sft.checkpoint.save_every = 1, 6, 2
    code, text = run_alone(config, tmp_path / "log")
    assert code == 0 and "note: 5 steps end within sft.schedule.warmup_steps 6" in text, text
    (tmp_path / "run" / "sft" / "manifest.json").unlink()
    config.sft.steps, config.sft.schedule.warmup_steps = 3, 0
    assert run_alone(config, tmp_path / "log")[0] == 0
    meta = json.loads((tmp_path / "run" / "sft" / "manifest.json").read_text())["meta"]
    assert meta["checkpoint"] == "checkpoints/iter_0000005"


def test_bad_samples_are_named_by_line(task: Path, tmp_path: Path) -> None:
    lines = (task / "sft_train.jsonl").read_text().splitlines()[:12]
    long = json.loads(lines[0])
    lines[2] = '{"prompt": "3 #1'
    lines[4] = json.dumps({"prompt": "1 #1", "response": " "})
    lines[6] = json.dumps({**long, "response": " ".join([long["response"]] * 40)})
    lines[8] = json.dumps({"chat": [{"role": "user", "content": "no answer"}]})
    text = "\n".join(lines).replace('"prompt"', '"question"').replace('"response"', '"solution"')
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text + "\n")
    config = make_config(task, tmp_path / "run", ParallelConfig())
    config.sft.train, config.sft.validation, config.sft.steps = str(bad), None, 1
    config.sft.prompt_key, config.sft.response_key, config.sft.messages_key = "question", "solution", "chat"
    config.sft.schedule.warmup_steps = 0

    code, text = run_alone(config, tmp_path / "output")
    assert code == 2 and "Traceback" not in text and "4 bad samples" in text
    for line, problem in ((3, "malformed"), (5, "empty response"), (7, "too long"), (9, "empty response")):
        assert f"{bad}:{line}: {problem}" in text
    config.sft.bad_samples = "skip"
    code, text = run_alone(config, tmp_path / "output")
    assert code == 0 and "12 samples, 8 used, 4 skipped" in text and f"1 × too long: {bad}:7" in text
    config.run.dir, config.sft.bad_samples = str(tmp_path / "cut"), "truncate"
    code, text = run_alone(config, tmp_path / "output")
    assert code == 0 and "12 samples, 9 used, 1 truncated, 3 skipped" in text


def test_steps_that_are_not_finite_are_skipped_and_end_the_stage_saved(task: Path, tmp_path: Path) -> None:
    """The second step's weights are out of range: from then on no loss is finite."""
    config = make_config(task, tmp_path / "run", ParallelConfig())
    config.sft.validation, config.sft.optimizer.lr, config.sft.schedule.warmup_steps = None, 1e30, 0
    config.sft.checkpoint.save_every, config.run.skip_limit = 100, 3
    log = tmp_path / "output"

    def redirect() -> None:
        sys.stdout = sys.stderr = log.open("w", buffering=1)

    assert run_stage(config, redirect) == [2]
    text = log.read_text()
    assert "3 updates of the actor in a row" in text and "saved at iteration 4" in text and "Traceback" not in text
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "sft" / "checkpoints")] == ["iter_0000004"]
    assert [record["iteration"] for record in read_metrics(tmp_path / "run" / "sft")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_command_on_real_processes_saves_when_asked(task: Path, tmp_path: Path) -> None:
    config = make_config(task, tmp_path / "run", PP2)
    config.sft.steps, config.sft.validation, config.sft.checkpoint.save_every = 100_000, None, 100_000
    config.sft.schedule.kind = "constant"
    run = write_config(config)

    def ask() -> None:
        wait_until(lambda: len(run.stage("sft").recent_metrics()) > 2, "three steps", 120)
        os.kill(os.getpid(), signal.SIGUSR2)

    asker = threading.Thread(target=ask)
    asker.start()
    assert run_chain(run, config, ["sft"]) == SAVED
    asker.join()
    records = read_metrics(run.stage("sft").path)
    assert run.stage("sft").checkpoint_iteration() == records[-1]["iteration"] == len(records) < 100_000
