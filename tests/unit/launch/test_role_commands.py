"""What the roles of a stage are, here and on a cluster."""

import os
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.launch.local_chain import local_processes
from megatron_vcppo.launch.role_commands import KEPT_KERNELS, role_environment
from megatron_vcppo.run.rollout_store import stored_set
from megatron_vcppo.slurm.srun import stage_nodes
from tools.benchmarks._tiny_chains import steps_of, tiny_config, write_config


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


def test_kernels_of_shapes_that_are_gone_are_dropped_without_gpus(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert role_environment(config, "trainer").items() >= KEPT_KERNELS.items()
    assert not KEPT_KERNELS.keys() & role_environment(config, "rollout").keys()
    config.cluster.gpus_per_node = 8
    assert not KEPT_KERNELS.keys() & role_environment(config, "trainer").keys()


def test_ranks_share_the_cores_of_their_node(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))

    def threads(config: Config) -> int:
        return int(role_environment(config, "trainer")["OMP_NUM_THREADS"])

    assert threads(tiny_config(tmp_path, ranks=1)) == cores
    config = tiny_config(tmp_path, ranks=2 * cores)
    assert threads(config) == 1
    config.cluster.trainer_nodes = 2  # of this machine
    assert threads(config) == 1
    config.cluster.name, config.cluster.cpus_per_node, config.cluster.trainer_ranks = "slurm", 48, 16
    assert threads(config) == 6, "8 ranks on each of 2 nodes"
    config.cluster.threads_per_rank = 3
    assert threads(config) == 3


def test_an_export_is_one_process_on_one_node(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ("sft", "export"), ranks=16)
    cluster = config.cluster
    cluster.trainer_nodes, cluster.gpus_per_node, cluster.cpus_per_node = 2, 8, 64
    run = write_config(config)
    assert (stage_nodes(config, "sft"), stage_nodes(config, "export")) == (2, 1)
    (step,) = steps_of(run, config, "export", ["a"])
    assert {"--nodelist=a", "--ntasks=1", "--cpus-per-task=64"} <= set(step.command)
    (process,) = local_processes(run, config, "export")
    assert process.env["WORLD_SIZE"] == "1" and len(local_processes(run, config, "sft")) == 16


def test_no_engines_start_where_the_set_of_rollouts_is_complete(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("value_pretrain",))
    config.value_pretrain.init, config.value_pretrain.rollouts = "sft", "stored"
    run = write_config(config)

    def roles() -> list[str]:
        here = local_processes(run, config, "value_pretrain")
        there = steps_of(run, config, "value_pretrain", ["a"])
        assert {process.role for process in here} == {step.role for step in there}
        return [process.role for process in here]

    assert roles() == ["trainer", "trainer", "rollout"]
    made = stored_set(config, "value_pretrain")
    assert made is not None
    made.folder.mkdir(parents=True)
    made.mark_complete()
    assert roles() == ["trainer", "trainer"]
