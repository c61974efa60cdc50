"""What is refused before a job is queued."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_inputs, check_layout
from tools.benchmarks._tiny_chains import tiny_config


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
