"""Layouts, margins, sweeps and parsers: pure functions."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.value_sources import CONFIGS, profile_files
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.checks import check_inputs, check_layout
from megatron_vcppo.launch.controller import reported_code
from megatron_vcppo.launch.memory_plan import check_memory, plan, plan_of_rank
from megatron_vcppo.launch.role_commands import RoleCommands, role_environment
from megatron_vcppo.launch.save_timing import (
    LEAST_S,
    STOP_S,
    save_allowance_s,
    save_clock,
    save_margin_s,
    signal_margin_s,
)
from megatron_vcppo.launch.snapshot import take_snapshot
from megatron_vcppo.launch.sweep_points import points, read_points, write_points
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log_files import last_lines
from megatron_vcppo.run.rollout_store import write_partial, write_rollouts
from megatron_vcppo.slurm.chain_status import leaving_note, pending_note
from megatron_vcppo.slurm.job import futile_starts, progress
from megatron_vcppo.slurm.slurm_cli import JobState, first_node, parse_table, slurm_message
from megatron_vcppo.slurm.srun import probe_command, stage_nodes
from megatron_vcppo.slurm.submission import executor
from tests.slurm.support import tiny_config, tiny_model, units_on, write_config


def test_trainer_and_rollout_steps_have_their_own_layout(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = config.cluster
    cluster.trainer_nodes, cluster.rollout_nodes, cluster.gpus_per_node, cluster.cpus_per_node = 2, 2, 8, 64
    cluster.trainer_ranks = 16
    run, hosts = write_config(config), ["a", "b", "c", "d"]
    units = units_on(run, config, "ppo", hosts)
    assert [(unit.role, unit.index) for unit in units] == [("trainer", 0), ("rollout", 0), ("rollout", 1)]
    trainer, *rollouts = (set(unit.command) for unit in units)
    assert {"--nodelist=a,b", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=8"} <= trainer
    assert {"--kill-on-bad-exit=0", "--gpus-per-node=8", "--overlap", "--distribution=block"} <= trainer
    assert [next(a for a in argv if a.startswith("--nodelist")) for argv in rollouts] == [
        "--nodelist=c",
        "--nodelist=d",
    ]
    assert units[0].env["MASTER_ADDR"] == "10.0.0.1" and units[0].env["SLURM_CPUS_PER_TASK"] == ""
    assert stage_nodes(config, "sft") == 2 and stage_nodes(config, "ppo") == 4
    cluster.rollout_nodes = 0
    colocated = units_on(run, config, "ppo", ["a", "b"])
    assert [next(a for a in unit.command if a.startswith("--nodelist")) for unit in colocated[1:]] == [
        "--nodelist=a",
        "--nodelist=b",
    ]


def test_a_sites_binding_and_layout_do_not_reach_the_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.gpus_per_node, config.cluster.rollout_nodes = 8, 1
    for unit in units_on(write_config(config), config, "ppo", ["a", "b"]):
        assert "--gpu-bind=none" in unit.command, "all GPUs in one order: ranks and engines choose theirs by it"
        for name in ("TRES_PER_TASK", "CPU_BIND", "CPU_BIND_TYPE", "GPU_BIND", "GPUS_PER_TASK", "NTASKS_PER_GPU"):
            assert unit.env[f"SLURM_{name}"] == ""
        assert unit.env["SLURM_DISTRIBUTION"] == "" and unit.env["SRUN_CPUS_PER_TASK"] == ""


def test_what_only_trainer_ranks_on_gpus_get(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    queue, allocator = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"
    assert not {queue, allocator} & set(role_environment(config, "trainer")), "no GPUs"
    config.cluster.gpus_per_node = 8
    assert role_environment(config, "trainer")[queue] == "1"
    assert role_environment(config, "trainer")[allocator] == "expandable_segments:True"
    assert not {queue, allocator} & set(role_environment(config, "rollout")), "vLLM's sleep mode refuses the second"
    config.cluster.engines_on = "trainer_gpus"
    assert allocator not in role_environment(config, "trainer")
    config.cluster.environment = {queue: "8"}
    assert role_environment(config, "trainer")[queue] == "8"


def test_engines_run_on_the_nodes_of_their_placement(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.trainer_nodes = 2
    run = write_config(config)
    for engines_on, rollout_nodes, hosts in (("trainer_gpus", 0, ["a", "b"]), ("rollout_nodes", 1, ["c"])):
        config.cluster.engines_on, config.cluster.rollout_nodes = engines_on, rollout_nodes  # type: ignore[assignment]
        units = units_on(run, config, "ppo", ["a", "b", "c"])[1:]
        assert [argument for unit in units for argument in unit.command if argument.startswith("--nodelist=")] == [
            f"--nodelist={host}" for host in hosts
        ]


def test_containers_wrap_the_roles(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run = write_config(config)
    config.cluster.container_image, config.cluster.container_mounts = "image.sqsh", "/data:/data"
    command = units_on(run, config, "sft", ["a"])[0].command
    assert "--container-image=image.sqsh" in command and "--container-mounts=/data:/data" in command
    config.cluster.container_runtime = "apptainer"
    command = units_on(run, config, "sft", ["a"])[0].command
    start = command.index("apptainer")
    assert command[start : start + 5] == ("apptainer", "exec", "--bind", "/data:/data", "image.sqsh")


def test_an_image_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run, host = write_config(config), RoleCommands().python
    config.cluster.container_python = "/image/python"
    assert host in units_on(run, config, "sft", ["a"])[0].command
    config.cluster.container_image = "image.sqsh"
    for unit in units_on(run, config, "ppo", ["a"]):
        assert "/image/python" in unit.command and host not in unit.command
    probe = " ".join(probe_command(config, run, RoleCommands(), ["a"]))
    assert "/image/python" in probe and host not in probe
    assert host in executor(run, config, "ppo", tmp_path, RoleCommands(), None).script()


def log_records(run: RunFolder, records: list[dict[str, float]]) -> None:
    run.stage("ppo").mkdir(exist_ok=True)
    text = "".join(json.dumps({"iteration": n} | record) + "\n" for n, record in enumerate(records, 1))
    (run.stage("ppo") / "metrics.jsonl").write_text(text)


def test_a_save_gets_what_pieces_of_work_and_saves_were_measured_to_need(tmp_path: Path) -> None:
    """Not what whole iterations need: a stop comes between pieces."""
    run = write_config(tiny_config(tmp_path))
    end = time.time() + 100_000
    assert save_margin_s(run, "ppo", 300) == 300, "nothing was measured"
    assert save_allowance_s(run, "ppo", 600, float("inf")) == 600
    assert save_allowance_s(run, "ppo", 600, end) == pytest.approx(100_000 - STOP_S, abs=5)
    iteration = {"timestamp": 0.0, "time/iteration_s": 4000.0, "stopping/longest_piece_s": 40.0}
    log_records(run, [iteration])
    assert save_margin_s(run, "ppo", 300) == 300, "no save has been timed"
    log_records(run, [iteration, iteration | {"timestamp": 4000.0, "stopping/save_s": 500.0}])
    assert save_margin_s(run, "ppo", 300) == 2 * 540 + STOP_S
    assert save_allowance_s(run, "ppo", 600, float("inf")) == save_allowance_s(run, "ppo", 600, end) == 2 * 540
    assert save_allowance_s(run, "ppo", 600, time.time() + 700) == pytest.approx(700 - STOP_S, abs=5)
    assert save_allowance_s(run, "ppo", 600, time.time() - 5) == STOP_S, "the job's end came before the request"
    log_records(run, [{"stopping/longest_piece_s": 0.01, "stopping/save_s": 0.1}])
    assert save_allowance_s(run, "ppo", 600, end) == LEAST_S and save_margin_s(run, "ppo", 300) == STOP_S
    assert signal_margin_s(run, "ppo", 300, 3600) == STOP_S + 60
    assert signal_margin_s(run, "ppo", 300, 60) == 30, "at most half of the time limit"
    assert not save_clock(run, "ppo", time.time() + 200, 300)() and save_clock(run, "ppo", time.time() - 1, 300)()


def test_stops_of_earlier_attempts_count_where_nothing_else_was_measured_or_they_were_too_slow(tmp_path: Path) -> None:
    run = write_config(tiny_config(tmp_path))
    events.append(run.path, "attempt_end", stage="ppo", code=1, leaving_s=None)
    events.append(run.path, "attempt_end", stage="ppo", code=75, leaving_s=70.0)
    assert save_margin_s(run, "ppo", 300) == 2 * 70 + STOP_S
    log_records(run, [{"stopping/longest_piece_s": 5.0, "stopping/save_s": 15.0}])
    assert save_margin_s(run, "ppo", 300) == 2 * 20 + STOP_S
    events.append(run.path, "attempt_end", stage="ppo", code=1, leaving_s=60.0)
    assert save_margin_s(run, "ppo", 300) == 2 * 60 + STOP_S, "it was ended after 60 s: it needs more"


def test_the_status_says_how_long_a_save_is_given(tmp_path: Path) -> None:
    asked = {"event": "save_requested", "stage": "ppo", "time": 0.0, "seconds": 340}
    attempt, end = {"event": "attempt", "stage": "ppo"}, {"event": "attempt_end", "stage": "ppo"}
    assert re.fullmatch(r"asked at \d\d:\d\d:\d\d to save and leave within 340 s", leaving_note([attempt, asked]))
    assert leaving_note([attempt]) == leaving_note([attempt, asked, end]) == leaving_note([]) == ""


def test_whatever_a_start_leaves_to_the_next_is_progress(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("ppo",))
    run = write_config(config)
    rollouts, checkpoints = run.stage("ppo") / "rollouts", run.stage("ppo") / "checkpoints"

    def start() -> None:
        events.append(run.path, "job", stage="ppo", job="7", progress=progress(run, config, "ppo"))

    def save(name: str, state: dict[str, Any]) -> None:
        (checkpoints / name).mkdir(parents=True, exist_ok=True)
        (checkpoints / name / "state.json").write_text(json.dumps({"state": state}))
        (checkpoints / name / "manifest.json").touch()

    for number in range(1, 4):
        start()
        assert futile_starts(run, config, "ppo") == number
    rollout = Rollout(Prompt("p", (1,), "", "", "t"), 0, 0, (2,), "", (-1.0,), "stop", 0)
    steps = [{"report": {"skipped": {"critic": [False] * n, "actor": []}}} for n in (1, 2)]
    for work in (
        lambda: write_partial(rollouts, 1, [rollout], 0, 1),
        lambda: write_partial(rollouts, 1, [rollout] * 9, 0, 1),
        lambda: write_rollouts(rollouts, 1, [rollout]),
        lambda: save("iter_0000000", {"unfinished": steps[0]}),
        lambda: save("iter_0000000", {"unfinished": steps[1]}),
        lambda: save("iter_0000001", {}),
    ):
        work()
        assert futile_starts(run, config, "ppo") == 0
        start()
        assert futile_starts(run, config, "ppo") == 1


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
    with pytest.raises(UserError, match=r"parallel.tp 4 would span nodes: only 2 ranks are on each of 2"):
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
    layers = actor - 2 * vocabulary
    config.model.fp8, config.ppo.loss.kl_coef = "hybrid", 0.1
    for stage, copies in (("ppo", 5), ("value_pretrain", 2), ("evaluate", 0)):
        assert plan(arch, config, stage)["8-bit weights"] * 2**30 == pytest.approx(copies * layers), stage
    config.model.fp8, config.ppo.loss.kl_coef = "off", 0.0
    assert plan(arch, config, "ppo") == parts
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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[0-1]", "node0"),
        ("gpu[003-005,9],big1", "gpu003"),
        ("a,b[1-2]", "a"),
        ("rack[7]", "rack7"),
        ("one", "one"),
        ("", ""),
    ],
)
def test_the_first_of_slurms_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
