"""The steps of a stage on the nodes of its job."""

from pathlib import Path

from megatron_vcppo.config.rules.slurm_options import OF_A_STEP
from megatron_vcppo.launch.controller import RoleProcess
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.slurm.srun import probe_command, stage_nodes
from megatron_vcppo.slurm.submission import executor
from tools.benchmarks._tiny_chains import steps_of, tiny_config, write_config


def option(process: RoleProcess, name: str) -> str:
    """The value of one of srun's options."""
    (found,) = (argument for argument in process.command if argument.startswith(f"--{name}="))
    return found.partition("=")[2]


def test_trainer_and_rollout_steps_have_their_own_layout(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = config.cluster
    cluster.trainer_nodes, cluster.rollout_nodes, cluster.gpus_per_node, cluster.cpus_per_node = 2, 2, 8, 64
    cluster.trainer_ranks = 16
    run = write_config(config)
    trainer, *rollouts = steps_of(run, config, "ppo", ["a", "b", "c", "d"])
    assert [(step.role, step.index) for step in (trainer, *rollouts)] == [
        ("trainer", 0),
        ("rollout", 0),
        ("rollout", 1),
    ]
    assert option(trainer, "nodelist") == "a,b"
    assert (option(trainer, "ntasks"), option(trainer, "ntasks-per-node")) == ("16", "8")
    assert option(trainer, "cpus-per-task") == "8", "a node's CPUs are shared among its ranks"
    assert option(trainer, "distribution") == "block", "ranks of a node follow each other"
    assert option(trainer, "kill-on-bad-exit") == "0", "peers of a rank that saved are still writing"
    assert [option(step, "nodelist") for step in rollouts] == ["c", "d"], "each can be started again alone"
    assert all(option(step, "gpus-per-node") == "8" for step in (trainer, *rollouts))
    assert trainer.env["MASTER_ADDR"] == "10.0.0.1"
    assert stage_nodes(config, "sft") == 2 and stage_nodes(config, "ppo") == 4
    cluster.rollout_nodes = 0
    _, *colocated = steps_of(run, config, "ppo", ["a", "b"])
    assert [option(step, "nodelist") for step in colocated] == ["a", "b"]


def test_a_sites_options_are_in_every_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = config.cluster
    cluster.gpus_per_node, cluster.rollout_nodes, cluster.trainer_ranks = 8, 1, 8
    cluster.container_image, cluster.container_mounts = "x.sqsh", "/x:/x"
    run = write_config(config)

    def commands() -> list[tuple[str, ...]]:
        roles = [process.command for process in steps_of(run, config, "ppo", ["a", "b"])]
        return [*roles, probe_command(config, run, RoleCommands(), ["a", "b"])]

    plain = commands()
    cluster.srun = {"mpi": "none", "unbuffered": "true"}
    for before, after in zip(plain, commands(), strict=True):
        assert set(after) - set(before) == {"--mpi=none", "--unbuffered"}
        assert after.index("--unbuffered") < next(i for i, word in enumerate(after) if word.startswith("--job-name="))
        options = [word[2:].partition("=")[0] for word in before[1:] if word.startswith("--")]
        step = options[: options.index("job-name") + 1]
        assert set(step) <= set(OF_A_STEP), "none of them may be replaced"


def test_a_sites_binding_and_layout_do_not_reach_the_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.gpus_per_node, config.cluster.rollout_nodes = 8, 1
    for step in steps_of(write_config(config), config, "ppo", ["a", "b"]):
        assert "--gpu-bind=none" in step.command, "all GPUs in one order: ranks and engines choose theirs by it"
        for name in ("TRES_PER_TASK", "CPU_BIND", "CPU_BIND_TYPE", "GPU_BIND", "GPUS_PER_TASK", "NTASKS_PER_GPU"):
            assert step.env[f"SLURM_{name}"] == ""
        assert step.env["SLURM_DISTRIBUTION"] == "" and step.env["SRUN_CPUS_PER_TASK"] == ""


def test_engines_run_on_the_nodes_of_their_placement(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.trainer_nodes = 2
    run = write_config(config)
    for engines_on, rollout_nodes, hosts in (("trainer_gpus", 0, ["a", "b"]), ("rollout_nodes", 1, ["c"])):
        config.cluster.engines_on, config.cluster.rollout_nodes = engines_on, rollout_nodes  # type: ignore[assignment]
        steps = steps_of(run, config, "ppo", ["a", "b", "c"])[1:]
        assert [option(step, "nodelist") for step in steps] == hosts


def test_containers_wrap_the_roles(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run = write_config(config)
    config.cluster.container_image, config.cluster.container_mounts = "image.sqsh", "/data:/data"
    command = steps_of(run, config, "sft", ["a"])[0].command
    assert "--container-image=image.sqsh" in command and "--container-mounts=/data:/data" in command
    config.cluster.container_runtime = "apptainer"
    command = steps_of(run, config, "sft", ["a"])[0].command
    start = command.index("apptainer")
    assert command[start : start + 5] == ("apptainer", "exec", "--bind", "/data:/data", "image.sqsh")


def test_an_image_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run, host = write_config(config), RoleCommands().python
    config.cluster.container_python = "/image/python"
    assert host in steps_of(run, config, "sft", ["a"])[0].command
    config.cluster.container_image = "image.sqsh"
    for step in steps_of(run, config, "ppo", ["a"]):
        assert "/image/python" in step.command and host not in step.command
    probe = " ".join(probe_command(config, run, RoleCommands(), ["a"]))
    assert "/image/python" in probe and host not in probe
    assert host in executor(run, config, "ppo", tmp_path, RoleCommands(), None).script()
