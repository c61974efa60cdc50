"""Layouts, margins, sweeps and parsers: pure functions."""

import json
import time
from pathlib import Path

import pytest

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.sources import CONFIGS
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.architecture import Architecture
from slurm.controller import reported_code
from slurm.logs import last_lines
from slurm.memory import check_memory, plan, plan_of_rank
from slurm.prepare import profile_files
from slurm.query import JobState, parse_table, slurm_message
from slurm.roles import Programs
from slurm.snapshot import take_snapshot
from slurm.srun import probe_command, srun_units, stage_nodes
from slurm.status import pending_note
from slurm.submit import executor
from slurm.sweep import points, read_points, text_table, write_points
from slurm.timing import STOP_S, save_clock, save_margin_s, signal_margin_s
from slurm.validate import check_inputs, check_layout
from tests.slurm.support import tiny_config, tiny_model, write_config


def test_trainer_and_rollout_steps_have_their_own_layout(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = config.cluster
    cluster.trainer_nodes, cluster.rollout_nodes, cluster.gpus_per_node, cluster.cpus_per_node = 2, 2, 8, 64
    cluster.trainer_ranks = 16
    run, hosts = write_config(config), ["a", "b", "c", "d"]
    units = srun_units(run, config, "ppo", Programs(), hosts, 29500, tmp_path / "logs")
    assert [(unit.role, unit.index) for unit in units] == [("trainer", 0), ("rollout", 0), ("rollout", 1)]
    trainer, *rollouts = (set(unit.command) for unit in units)
    assert {"--nodelist=a,b", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=8"} <= trainer
    assert {"--kill-on-bad-exit=0", "--gpus-per-node=8", "--overlap"} <= trainer
    assert [next(a for a in argv if a.startswith("--nodelist")) for argv in rollouts] == [
        "--nodelist=c",
        "--nodelist=d",
    ]
    assert units[0].env["MASTER_ADDR"] == "a" and units[0].env["SLURM_CPUS_PER_TASK"] == ""
    assert stage_nodes(config, "sft") == 2 and stage_nodes(config, "ppo") == 4
    cluster.rollout_nodes = 0
    colocated = srun_units(run, config, "ppo", Programs(), ["a", "b"], 29500, tmp_path)
    assert [next(a for a in unit.command if a.startswith("--nodelist")) for unit in colocated[1:]] == [
        "--nodelist=a",
        "--nodelist=b",
    ]


def test_containers_wrap_the_roles(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run = write_config(config)
    config.cluster.container_image, config.cluster.container_mounts = "image.sqsh", "/data:/data"
    command = srun_units(run, config, "sft", Programs(), ["a"], 1, tmp_path)[0].command
    assert "--container-image=image.sqsh" in command and "--container-mounts=/data:/data" in command
    config.cluster.container_runtime = "apptainer"
    command = srun_units(run, config, "sft", Programs(), ["a"], 1, tmp_path)[0].command
    start = command.index("apptainer")
    assert command[start : start + 5] == ("apptainer", "exec", "--bind", "/data:/data", "image.sqsh")


def test_an_image_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run, programs = write_config(config), Programs(python="/host/python")
    config.cluster.container_python = "/image/python"
    assert "/host/python" in srun_units(run, config, "sft", programs, ["a"], 1, tmp_path)[0].command
    config.cluster.container_image = "image.sqsh"
    for unit in srun_units(run, config, "ppo", programs, ["a"], 1, tmp_path):
        assert "/image/python" in unit.command and "/host/python" not in unit.command
    probe = " ".join(probe_command(config, run, programs, ["a"]))
    assert "/image/python" in probe and "/host/python" not in probe
    assert "/host/python" in executor(run, config, "ppo", tmp_path, programs, None).script()


def test_the_margin_follows_what_was_measured(tmp_path: Path) -> None:
    run = write_config(tiny_config(tmp_path))
    assert save_margin_s(run, "sft", 300) == 300
    run.stage("sft").mkdir()
    records = [{"iteration": n, "timestamp": stamp} for n, stamp in enumerate((100.0, 120.0, 170.0, 9000.0, 9020.0))]
    (run.stage("sft") / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert save_margin_s(run, "sft", 300) == 300, "no checkpoint has been timed"
    (run.stage("sft") / "checkpoints" / "iter_0000002").mkdir(parents=True)
    (run.stage("sft") / "checkpoints" / "iter_0000002" / "manifest.json").touch()
    (run.path / "events.jsonl").write_text(json.dumps({"time": 8000, "event": "attempt", "stage": "sft"}))
    assert save_margin_s(run, "sft", 300) == 2 * 50 + STOP_S, "the wait before the second attempt is no iteration"
    assert signal_margin_s(run, "sft", 300, 3600) == 2 * 50 + STOP_S + 60
    assert signal_margin_s(run, "sft", 300, 60) == 30, "at most half of the time limit"
    assert not save_clock(run, "sft", time.time() + 200, 300)() and save_clock(run, "sft", time.time() - 1, 300)()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer_ranks", 16, "16 trainer ranks per node need as many GPUs; cluster.gpus_per_node is 8"),
        ("stage_time_limit_minutes", {"pppo": 5}, "names no stage of this chain: pppo"),
    ],
)
def test_layouts_that_cannot_be(tmp_path: Path, key: str, value: object, message: str) -> None:
    config = tiny_config(tmp_path)
    config.cluster.trainer_ranks, config.cluster.gpus_per_node = 8, 8
    setattr(config.cluster, key, value)
    with pytest.raises(UserError, match=message):
        check_layout(config)


def test_tensor_parallelism_stays_inside_a_node(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.trainer_ranks, config.cluster.trainer_nodes, config.parallel.tp = 4, 2, 4
    with pytest.raises(UserError, match=r"parallel.tp = 4 would span nodes: only 2 ranks are on each of 2"):
        check_layout(config)


def test_inputs_are_checked_before_anything_is_queued(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    assert check_inputs(config, ["sft"])["sft"] > 3
    config.sft.train = "/no/such/file.jsonl"
    with pytest.raises(UserError, match=r"sft\.train: /no/such/file\.jsonl does not exist"):
        check_inputs(config, ["sft"])
    config.sft.train, config.parallel.tp = "unused", 3
    with pytest.raises(UserError, match="attention heads 4 is not divisible by tp 3"):
        check_inputs(config, ["sft"])
    config.model.hf = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        check_inputs(config, ["sft"])


def test_the_memory_plan_against_a_count_by_hand(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "models" / "tiny.yaml", complete=False)
    config.model.dtype, config.parallel.tokens_per_microbatch = "bfloat16", 1024
    arch = Architecture.from_hf(str(tiny_model(tmp_path)))
    actor, vocabulary = arch.parameter_count(), 256 * 64
    parts = plan(arch, config, "ppo")
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held * 2**30 == pytest.approx((2 * actor - vocabulary) * (2 + 4 + 12)), "a critic has no output layer"
    layer = 6 * 64 + 4 * 64 + 3 * 32 + 5 * 128
    assert parts["activations"] * 2**30 == 1024 * 2 * 2 * layer
    assert parts["logits"] * 2**30 == 256 * 2 * 1024 * 2
    pushed = plan(arch, config, "value_pretrain")
    assert pushed["weights"] * 2**30 == (2 * actor - vocabulary) * 2, "a critic, and the actor that generates"
    assert pushed["gradients"] * 2**30 == (actor - vocabulary) * 4 and not pushed["logits"]
    config.parallel.recompute = "full"
    recomputed = plan(arch, config, "ppo")
    assert recomputed["activations"] * 2**30 == 1024 * 2 * (2 * 64 + layer - 2 * 256), "a layer, once logits are gone"
    config.parallel.recompute = "none"
    config.parallel.cp, config.parallel.distributed_optimizer = 2, True
    shared = plan(arch, config, "ppo")
    for name in ("activations", "optimizer"):
        assert shared[name] == pytest.approx(parts[name] / 2), name
    assert shared["weights"] == parts["weights"] and shared["gradients"] == parts["gradients"]
    config.parallel.cp, config.parallel.distributed_optimizer = 1, False
    config.cluster.gpu_memory_gib = 3
    with pytest.raises(UserError, match=r"ppo needs about 3 GiB per GPU \(weights 0\.0, "):
        check_memory(arch, config, ["ppo"])


def test_the_memory_plan_follows_the_layout(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "models" / "tiny.yaml", complete=False)
    arch = Architecture.from_hf(str(tiny_model(tmp_path)))
    alone = plan(arch, config, "sft")
    config.parallel.tp = 2
    assert plan(arch, config, "sft")["gradients"] == alone["gradients"] / 2
    assert alone["activations"] / 2 < plan(arch, config, "sft")["activations"] < alone["activations"]
    config.parallel.sequence_parallel = True
    assert plan(arch, config, "sft")["activations"] == alone["activations"] / 2
    config.parallel.tp, config.parallel.sequence_parallel, config.parallel.dp = 1, False, 4
    config.parallel.distributed_optimizer = True
    assert plan(arch, config, "sft")["optimizer"] == alone["optimizer"] / 4
    config.parallel.dp, config.parallel.pp = None, 2
    first, last = (plan_of_rank(arch, config, "sft", rank) for rank in (0, 1))
    assert first["activations"] == alone["activations"] and not first["logits"], "two micro-batches of half the layers"
    assert last["activations"] == alone["activations"] / 2 and last["logits"] == alone["logits"]


def test_states_of_squeue_and_sacct() -> None:
    states = parse_table(
        "17|PENDING|Dependency|0:00||N/A|\n18|CANCELLED by 0|None|00:03|n[0-1]|2026-01-01T00:00:00|0:15\n"
    )
    assert states["17"].active and states["17"].reason == "Dependency"
    assert states["18"].state == "CANCELLED" and not states["18"].active and states["18"].nodes == "n[0-1]"


def test_why_a_job_waits() -> None:
    assert pending_note(JobState("7", "PENDING", "Dependency")) == "waits for the stage before"
    assert pending_note(JobState("7", "PENDING", "Resources", start="12:00")) == "waits for free nodes, expected 12:00"
    held = pending_note(JobState("7", "PENDING", "launch failed requeued held", start="N/A"))
    assert held == "launch failed requeued held: once its cause is mended, scontrol release 7"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("srun: error: n1: task 1: Exited with exit code 2\nsrun: error: n0: task 0: Terminated", 2),
        ("srun: error: n1: tasks 3-5,7: Killed\nsrun: error: n0: task 0: Exited with exit code 1", 137),
        ("srun: error: n1: task 1: Exited with exit code 75\nsrun: error: n0: task 0: Exited with exit code 75", 0),
        ("srun: error: n0: task 0: Exited with exit code 1\nsrun: error: n1: task 1: Killed", 137),
        ("srun: error: n1: task 1: Aborted (core dumped)", 134),
        ("srun: Job 7 step creation temporarily disabled, retrying", 0),
    ],
)
def test_the_task_that_is_the_cause_decides(text: str, code: int) -> None:
    assert reported_code(text) == code


def test_slurms_message_loses_its_prefixes() -> None:
    text = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    assert slurm_message(text) == "invalid partition specified: x; Batch job submission failed: Invalid partition"


def test_sweep_points(tmp_path: Path) -> None:
    made, fixed = points(["a=[1, 2]", "b=3", "c=[x, y]"])
    assert fixed == ["b=3"] and [point.overrides for point in made] == [
        ("a=1", "c=x"), ("a=1", "c=y"), ("a=2", "c=x"), ("a=2", "c=y"),
    ]  # fmt: skip
    write_points(tmp_path, made)
    assert read_points(tmp_path) == made
    with pytest.raises(UserError, match="another sweep lives here"):
        write_points(tmp_path, made[:1])
    with pytest.raises(UserError, match="nothing varies"):
        points(["a=1"])
    assert text_table([{"run": "0", "loss": 0.123456}]) == "run  loss\n0    0.1235"


def test_every_shipped_profile_loads() -> None:
    files = sorted((CONFIGS / "cluster").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_config(file, complete=False).cluster.name == file.stem
    with pytest.raises(UserError, match="--cluster nowhere: no such profile; there are: local, devcluster"):
        profile_files("nowhere")


def test_a_snapshot_is_the_code_and_is_taken_once(tmp_path: Path) -> None:
    first = take_snapshot(tmp_path)
    assert (first / "slurm" / "job.py").read_text() == (Path("slurm") / "job.py").read_text()
    assert (first / "megatron_vcppo" / "records.py").exists() and take_snapshot(tmp_path) == first


def test_last_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("x" * 100_000 + "\none\n\ntwo\n")
    assert last_lines(path, 2) == ["one", "two"] and last_lines(tmp_path / "none") == []
