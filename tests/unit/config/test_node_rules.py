"""Keys of the section cluster that cannot work as they are written."""

import re

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.rules.slurm_options import OF_A_JOB, OF_A_STEP
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.errors import UserError


@pytest.fixture
def config() -> Config:
    """A chain that generates, on two trainer nodes and one rollout node."""
    config = Config()
    config.run.dir, config.model.hf, config.sft.train, config.stages = (
        "runs/x",
        "models/x",
        "x.jsonl",
        ["sft", "evaluate"],
    )
    config.prompts.train = config.prompts.test = "x.jsonl"
    config.cluster.name, config.cluster.trainer_nodes, config.cluster.rollout_nodes = "big", 2, 1
    config.cluster.gpus_per_node, config.cluster.cpus_per_node = 1, 4
    return config


def error_of(config: Config) -> str:
    with pytest.raises(UserError) as failure:
        check_config(config)
    return str(failure.value)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("name", ["", "5", "ib0,ib1", "ib 0", "^lo", "=eth0", "999.1.1.1", "fe80::1", "a/b", "a" * 16])
def test_what_is_no_interface_is_refused_before_a_job_is_queued(config: Config, name: str, nodes: int) -> None:
    config.cluster.trainer_nodes, config.cluster.network_interface = nodes, name
    expected = (
        f"cluster.network_interface {name!r} is neither an interface such as ib0 nor an IPv4 address: set one name"
    )
    assert error_of(config).startswith(expected)


@pytest.mark.parametrize("name", ["ens1f0", "ib0", "bond0.100", "enp3s0f1np1", "hsn0"])
def test_interfaces_pass(config: Config, name: str) -> None:
    config.cluster.network_interface = name
    check_config(config)


@pytest.mark.parametrize("folder", ["", "cache", "~/cache", "$TMPDIR/cache", "/scratch/$USER"])
def test_the_cache_is_an_absolute_path(config: Config, folder: str) -> None:
    config.cluster.node_cache = folder
    assert error_of(config).startswith(f"cluster.node_cache {folder!r} must be an absolute path without variables")
    config.cluster.node_cache = "/scratch/me"
    check_config(config)


@pytest.mark.parametrize("key", ["container_python", "container_mounts"])
def test_keys_of_a_container_need_its_image(config: Config, key: str) -> None:
    setattr(config.cluster, key, "/x")
    assert error_of(config) == f"cluster.{key} /x needs cluster.container_image: set that, or cluster.{key} to null"
    config.cluster.container_image = "/x.sqsh"
    check_config(config)


def test_offloaded_weights_need_shared_gpus(config: Config) -> None:
    config.weight_sync.offload_weights = True
    assert "needs cluster.engines_on trainer_gpus" in error_of(config) and "got rollout_nodes" in error_of(config)
    config.cluster.engines_on, config.cluster.rollout_nodes = "trainer_gpus", 0
    check_config(config)
    config.cluster.engines_on, config.stages = None, ["sft"]
    check_config(config)


def test_engines_that_leave_the_trainer_no_gpu_are_one_problem(config: Config) -> None:
    config.cluster.rollout_nodes, config.cluster.gpus_per_node, config.parallel.tp = 0, 4, 2
    config.rollout.engine.per_node = 4
    assert error_of(config).startswith("cluster.engines_on trainer_nodes: 1 trainer rank and 4 engines")


def test_a_python_path_that_hides_the_submitted_code_is_refused(config: Config) -> None:
    config.cluster.environment = {"PYTHONPATH": "/shared/mine"}
    assert "'export PYTHONPATH=/shared/mine' into cluster.setup" in error_of(config)
    config.cluster.name = "local"
    check_config(config)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("sbatch", name) for name in (*OF_A_JOB, "sig", "dep", "out", "o", "requ")),
        *(("srun", name) for name in (*OF_A_STEP, "exp", "over", "gpus-per", "n")),
    ],
)
def test_options_on_which_the_chain_relies_are_not_replaced(config: Config, key: str, name: str) -> None:
    setattr(config.cluster, key, {name: "1"})
    assert re.match(
        rf"cluster\.{key}\.{name}: --{name}.* is for the chain alone to set or leave out: ", error_of(config)
    )
    setattr(config.cluster, key, {})
    config.overrides = {"sft": {"cluster": {key: {name: "1"}}}}
    assert error_of(config).startswith(f"overrides.sft: cluster.{key}.{name}: --{name}")


@pytest.mark.parametrize(("name", "value"), [("a b", "x"), ("N", "2"), ("mpi", "x\ny"), ("mpi=x --export", "NONE")])
def test_what_is_no_option_of_a_step_is_refused(config: Config, name: str, value: str) -> None:
    config.cluster.srun = {name: value}
    assert error_of(config).startswith("cluster.srun")


def test_a_refused_option_names_the_key_to_set(config: Config) -> None:
    config.cluster.sbatch = {"nodes": "3"}
    assert error_of(config).endswith("alone to set or leave out: set cluster.trainer_nodes and cluster.rollout_nodes")


def test_options_of_sites_pass(config: Config) -> None:
    names = (
        "acctg-freq begin comment constraint contiguous cpu-freq deadline exclude exclusive export gres gres-flags hint"
    )
    names += " hold licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu network nice nodelist"
    names += " partition account prefer priority qos reservation switches threads-per-core time-min tmp wait-all-nodes"
    config.cluster.sbatch = dict.fromkeys(names.split(), "1")
    names = "mpi network cpu-bind mem-bind unbuffered exact container-name container-writable task-prolog mem time"
    config.cluster.srun = dict.fromkeys(names.split(), "1")
    check_config(config)
